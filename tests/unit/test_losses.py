import torch
import torch.nn.functional as F

from ftlab import IGNORE_INDEX
from ftlab.losses import CrossEntropy, token_nll_sum


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
