"""Documents packed into one row, and sliding windows: the same numbers as rows of their own, and nothing leaks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftlab.distributed.activation import checkpoint_activations
from ftlab.models import attention, cpu_attention
from ftlab.models.attention import Causal, Documents
from ftlab.models.cpu_attention import attend_by_document
from ftlab.models.layers import KVCache
from tests.unit.test_transformer import initialised, small

N_TOKENS = 29  # of a packed row


def nll_sum(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ head_weight.T, targets, reduction="sum")


@st.composite
def packed_rows(draw) -> list[list[int]]:
    """Lengths of the documents of each row, padding among them."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(1, N_TOKENS - 1), max_size=6)))
        rows.append([end - start for start, end in zip([0, *cuts], [*cuts, N_TOKENS], strict=True)])
    return rows


def ids_of(rows: list[list[int]]) -> Tensor:
    """Ids that say nothing but "another than its neighbour": 0 and 1 in turn, in every row."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)) % 2, torch.tensor(row)) for row in rows])


def documents(tokens: Tensor, rows: list[list[int]]) -> list[Tensor]:
    return [part[None] for row, lengths in zip(tokens, rows, strict=True) for part in row.split(lengths)]


def gradients(model) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows=packed_rows(), window=st.sampled_from([None, 1, 4, 40]), seed=st.integers(0, 2**31))
def test_packed_and_separate_rows_give_the_same_loss_and_gradients(rows, window, seed):
    model = initialised(small(family="mistral", sliding_window=window), seed)
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(61, (2, len(rows), N_TOKENS), generator=generator)

    packed = model(tokens, targets, nll_sum, doc_ids=ids_of(rows))
    packed.backward()
    from_packed = gradients(model)
    pairs = zip(documents(tokens, rows), documents(targets, rows), strict=True)
    separate = sum(model(document, target, nll_sum) for document, target in pairs)
    separate.backward()

    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(from_packed[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(rows=packed_rows(), window=st.sampled_from([None, 3]), seed=st.integers(0, 2**31), data=st.data())
def test_changing_one_document_changes_no_other_by_a_single_bit(rows, window, seed, data):
    model = initialised(small(family="mistral", sliding_window=window), seed)
    tokens = torch.randint(61, (len(rows), N_TOKENS), generator=torch.Generator().manual_seed(seed))
    row = data.draw(st.integers(0, len(rows) - 1))
    changed = data.draw(st.integers(0, len(rows[row]) - 1))
    start = sum(rows[row][:changed])
    end = start + rows[row][changed]
    others = tokens.clone()
    others[row, start:end] = (others[row, start:end] + 7) % 61

    before, after = (model(t, doc_ids=ids_of(rows)) for t in (tokens, others))
    differs = (before != after).any(dim=-1)
    assert differs[row, start], "the document itself must change"
    differs[row, start:end] = False
    assert not differs.any()


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_repeats_packed_attention_to_the_bit(mode):
    rows = [[7, 1, 13, 8], [29]]
    tokens, targets = torch.randint(61, (2, 2, N_TOKENS), generator=torch.Generator().manual_seed(0))
    found = []
    for recompute in ("none", mode):
        model = initialised(small(family="mistral", sliding_window=5))
        checkpoint_activations(model, recompute)
        model(tokens, targets, nll_sum, doc_ids=ids_of(rows)).backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_onednn", [True, False])  # long documents in blocks or not
@pytest.mark.parametrize("window", [None, 3, 150, 250])
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_attention_and_its_gradients_are_those_of_each_document_in_float64(
    n_kv_heads, window, by_onednn, dtype, monkeypatch
):
    monkeypatch.setattr(cpu_attention, "multiplied_by_onednn", lambda dtype: by_onednn)
    generator = torch.Generator().manual_seed(0)
    rows = [[20, 280, 84], [384]]
    n_tokens, tolerance = sum(rows[0]), {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    shapes = ((2, n_tokens, heads, 8) for heads in (4, n_kv_heads, n_kv_heads))
    inputs = [torch.randn(*s, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for s in shapes]
    d_answer = torch.randn(2, n_tokens, 4, 8, generator=generator).to(dtype).transpose(1, 2)
    answer = Documents(ids_of(rows), window)(*inputs)

    exact = [t.detach().double().repeat_interleave(4 // t.shape[1], dim=1).requires_grad_() for t in inputs]
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])
    allowed = (ids[:, :, None] == ids[:, None, :]).tril().triu(1 - window if window else -n_tokens)[:, None]
    q, k, v = exact
    scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~allowed, -torch.inf)
    expected = scores.softmax(-1) @ v
    found = (answer, *torch.autograd.grad(answer, inputs, d_answer))
    for one, other in zip(found, (expected, *torch.autograd.grad(expected, exact, d_answer.double())), strict=True):
        other = other.unflatten(1, (one.shape[1], -1)).sum(2)  # a key's gradient is the sum of its queries' heads'
        assert one.dtype == dtype
        assert (one - other).norm() <= tolerance * other.norm()
    begins = Documents(ids_of(rows), window)._begins
    torch.library.opcheck(attend_by_document, (*inputs, begins, window))


def test_a_row_that_is_one_document_is_an_ordinary_row():
    model = initialised(small())
    tokens = torch.arange(2 * N_TOKENS).view(2, N_TOKENS) % 61
    packed = model(tokens, doc_ids=torch.zeros_like(tokens))
    torch.testing.assert_close(packed, model(tokens), rtol=0, atol=1e-6)  # several threads add in another order


def test_positions_begin_anew_in_every_document():
    ids = torch.tensor([[4, 4, 4, 9, 9, 4], [4, 4, 7, 7, 7, 7]])
    expected = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]])
    assert torch.equal(Documents(ids, None).positions, expected)


@pytest.mark.parametrize("window", [None, 5])
def test_the_mask_that_cuda_computes_with_allows_what_the_host_s_loop_does(window):
    rows = [[7, 1, 13, 8], [29]]
    ids = ids_of(rows)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    mask = attention._block_mask(begins.cumsum(dim=1), window)
    q, k, v = (torch.randn(2, heads, N_TOKENS, 16) for heads in (4, 2, 2))
    from torch.nn.attention.flex_attention import flex_attention

    theirs = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(Documents(ids, window)(q, k, v), theirs, rtol=0, atol=1e-5)


# ---- sliding windows


@pytest.mark.parametrize("window", [1, 3, 8, 12, 13, 40])
@pytest.mark.parametrize("n_new", [1, 4, 13])
def test_a_window_is_that_of_brute_force(window, n_new):
    q, k, v = torch.randn(2, 4, n_new, 8), torch.randn(2, 2, 13, 8), torch.randn(2, 2, 13, 8)
    out = Causal(window)(q, k, v)
    for head in range(4):
        for i in range(n_new):
            place = 13 - n_new + i
            seen = slice(max(0, place - window + 1), place + 1)
            scores = torch.einsum("bd,bsd->bs", q[:, head, i], k[:, head // 2, seen]) / 8**0.5
            expected = torch.einsum("bs,bsd->bd", scores.softmax(-1), v[:, head // 2, seen])
            torch.testing.assert_close(out[:, head, i], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [2, 7, 30])
def test_a_windowed_model_through_the_cache_equals_one_without(window):
    model = initialised(small(family="mistral", sliding_window=window))
    tokens = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(0))
    cache = KVCache(n_layers=2, capacity=20)
    chunks = [model(part, cache=cache) for part in tokens.split([9, 1, 1, 6, 3], dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), model(tokens), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_cuda_packs_without_compiling_anew_for_other_documents(window):
    torch._dynamo.reset()
    torch._dynamo.config.error_on_recompile, before = True, torch._dynamo.config.error_on_recompile
    try:
        q, k, v = (torch.randn(2, heads, 512, 64, device="cuda", requires_grad=True) for heads in (4, 2, 2))
        for rows in ([[100, 12, 400], [512]], [[1, 511], [256, 256]]):
            ids = ids_of(rows)
            ours = Documents(ids.cuda(), window)(q, k, v)
            ours.sum().backward()
            theirs = Documents(ids, window)(q.cpu(), k.cpu(), v.cpu())
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=5e-3)  # TF32 products
    finally:
        torch._dynamo.config.error_on_recompile = before


@pytest.mark.parametrize(("window", "packed", "name"), [
    (None, False, "flash"),
    (4, False, "flash"),
    (None, True, "flash, a call per document"),
])  # fmt: skip
def test_the_kernel_that_a_run_names_is_the_one_that_its_model_calls(window, packed, name):
    model = initialised(small(family="mistral", sliding_window=window), 0)
    cpu = torch.device("cpu")
    assert attention.kernel_name(model.config, 16, torch.float32, cpu, packed=packed) == name
    tokens = torch.arange(16)[None] % 61
    with torch.profiler.profile() as profile:
        model(tokens, doc_ids=torch.zeros_like(tokens) if packed else None)
    called = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in called
