from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ftlab import IGNORE_INDEX
from ftlab.losses import ChunkedCrossEntropy, CrossEntropy, token_nll_sum
from ftlab.models.live_bytes import LiveBytes, live_peaks


def random_problem(n=50, d=16, v=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, v, (n,), generator=g)
    targets[::3] = IGNORE_INDEX
    return torch.randn(n, d, generator=g), torch.randn(v, d, generator=g), targets


def test_the_sum_equals_float64_log_softmax_by_hand():
    hidden, weight, targets = random_problem()
    log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
    by_hand = -sum(log_p[i, t] for i, t in enumerate(targets.tolist()) if t != IGNORE_INDEX)
    loss = CrossEntropy(label_smoothing=0.0, z_loss=0.0)(hidden, weight, targets)
    torch.testing.assert_close(loss.double(), by_hand, rtol=1e-6, atol=0)


def test_all_positions_ignored_give_exactly_zero_and_zero_gradient():
    logits = torch.randn(4, 7, requires_grad=True)
    loss = token_nll_sum(logits, torch.full((4,), IGNORE_INDEX), label_smoothing=0.1, z_loss=0.1)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.abs().max() == 0


def test_label_smoothing_mixes_in_the_uniform_distribution():
    hidden, weight, targets = random_problem()
    log_p = (hidden.double() @ weight.double().T).log_softmax(-1)[targets != IGNORE_INDEX]
    kept = targets[targets != IGNORE_INDEX]
    by_hand = -(0.9 * log_p[range(len(kept)), kept] + 0.1 * log_p.mean(-1)).sum()
    loss = CrossEntropy(label_smoothing=0.1, z_loss=0.0)(hidden, weight, targets)
    torch.testing.assert_close(loss.double(), by_hand, rtol=1e-6, atol=0)


def test_z_loss_adds_the_squared_log_normaliser_of_target_positions_only():
    hidden, weight, targets = random_problem()
    log_z = (hidden.double() @ weight.double().T).logsumexp(-1)[targets != IGNORE_INDEX]
    plain = CrossEntropy(label_smoothing=0.0, z_loss=0.0)(hidden, weight, targets)
    with_z = CrossEntropy(label_smoothing=0.0, z_loss=0.5)(hidden, weight, targets)
    torch.testing.assert_close((with_z - plain).double(), 0.5 * log_z.square().sum(), rtol=1e-5, atol=0)


def test_the_softmax_of_bfloat16_logits_runs_in_float32():
    logits = torch.randn(8, 1000).bfloat16()
    targets = torch.randint(0, 1000, (8,))
    loss = token_nll_sum(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), targets, reduction="sum"))


def loss_and_gradients(loss, hidden, weight, targets, scale=0.01):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    total = loss(hidden, weight, targets)
    (total * scale).backward()
    return total.detach(), hidden.grad, weight.grad


SETTINGS = {  # of a chunked loss, and of what it is computed from
    "n": st.integers(0, 40),
    "chunk_tokens": st.integers(1, 50),
    "label_smoothing": st.sampled_from([0.0, 0.1]),
    "z_loss": st.sampled_from([0.0, 1e-3]),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=30, deadline=None)
@given(**SETTINGS)
def test_chunked_loss_and_gradients_are_those_of_the_plain_one(n, chunk_tokens, label_smoothing, z_loss, seed):
    problem = random_problem(n=n, seed=seed)
    plain = CrossEntropy(label_smoothing=label_smoothing, z_loss=z_loss)
    chunked = ChunkedCrossEntropy(label_smoothing=label_smoothing, z_loss=z_loss, chunk_tokens=chunk_tokens)
    for one, other in zip(loss_and_gradients(chunked, *problem), loss_and_gradients(plain, *problem), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(chunked(*problem), plain(*problem), rtol=1e-6, atol=1e-6)


def test_numbers_of_targets_that_are_close_make_the_same_products():
    """A CPU or GPU prepares a kernel for each shape of a product; targets are other ones in every step."""

    class Shapes(TorchDispatchMode):
        seen: ClassVar = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.mm:
                self.seen.update(tuple(tensor.shape) for tensor in args)
            return func(*args, **(kwargs or {}))

    loss = ChunkedCrossEntropy(label_smoothing=0.0, z_loss=0.0, chunk_tokens=128)
    with Shapes() as shapes:
        for n in (65, 70, 127, 128, 199, 240):
            loss_and_gradients(loss, *random_problem(n))
    assert {max(shape) for shape in shapes.seen} == {30, 128}


@pytest.mark.parametrize("n", [100, 2048])
def test_chunked_gradients_agree_with_float64_at_a_real_vocabulary(n):
    hidden, weight, targets = random_problem(n=n, d=32, v=32000)
    exact = loss_and_gradients(CrossEntropy(label_smoothing=0.0, z_loss=0.0), hidden.double(), weight.double(), targets)
    chunked = ChunkedCrossEntropy(label_smoothing=0.0, z_loss=0.0, chunk_tokens=1024)
    for one, other in zip(loss_and_gradients(chunked, hidden, weight, targets), exact, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-6, atol=1e-6)


def test_chunked_gradients_under_autocast_are_no_worse_than_the_plain_ones():
    hidden, weight, targets = random_problem(n=256, d=64, v=500)
    weight = weight * 0.1
    plain, chunked = (
        CrossEntropy(label_smoothing=0.0, z_loss=0.0),
        ChunkedCrossEntropy(label_smoothing=0.0, z_loss=0.0, chunk_tokens=64),
    )
    exact = loss_and_gradients(plain, hidden.double(), weight.double(), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = (
            loss_and_gradients(plain, hidden, weight, targets),
            loss_and_gradients(chunked, hidden, weight, targets),
        )
    for right, one, other in zip(exact, *measured, strict=True):
        assert other.dtype == one.dtype == torch.float32
        assert (other - right).norm() <= 1.1 * (one - right).norm()


def test_chunked_loss_needs_a_fifth_of_the_memory_at_most():
    def peak(loss):
        live = LiveBytes()
        live.enter("inputs")
        with FakeTensorMode(allow_fallback_kernels=False), live:
            hidden = torch.empty(16384, 256).requires_grad_()
            weight = torch.empty(32000, 256).requires_grad_()
            live.enter("forward")
            loss(hidden, weight, torch.zeros(16384, dtype=torch.int64)).backward()
        return max(live_peaks(live.phases))

    plain = peak(CrossEntropy(label_smoothing=0.0, z_loss=0.0))
    chunked = peak(ChunkedCrossEntropy(label_smoothing=0.0, z_loss=0.0, chunk_tokens=1024))
    assert 5 * chunked < plain, f"{chunked / 2**20:.0f} MiB and {plain / 2**20:.0f} MiB"
