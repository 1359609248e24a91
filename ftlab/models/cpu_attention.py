"""Causal attention on a CPU, document by document, as one operation.

Its shapes do not depend on the documents, so compiled code calls it whatever they are, and autograd keeps one node for
all of them. Where it is compiled, a kernel of our own (``cpu_kernel.py``) takes short documents of float32 and nearly
all of bfloat16. Others take torch's flash kernel in float32, for in 16 bits it needs two to five times as long, or, if
they are long and oneDNN computes these (``cpu_products.py``), plain matrix products, a block of queries at a time.
Scores and softmax stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ftlab.models.cpu_kernel import DocumentKernel
from ftlab.models.cpu_products import multiplied_by_mkl, multiplied_by_onednn

_aten = torch.ops.aten
LONG = 192  # tokens of a document from which on it may be computed in blocks
_BLOCK = 128  # queries of a block: with all their keys, its scores stay in the cache

_own_kernel: DocumentKernel | None = None


def attend_with(kernel: DocumentKernel | None) -> None:
    """Let ``kernel`` compute what it takes, in this process from now on."""
    global _own_kernel
    _own_kernel = kernel


@torch.library.custom_op("ftlab::attend_by_document", mutates_args=())
def attend_by_document(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of q (B, H, T, D) to k and v (B, K, T, D), of which H / K query heads share one.

    Args:
        begins: (B, T) bool, where a document begins; None: each row is one.
        window: tokens that one attends to, itself included; None: all before it.

    Returns:
        The answer (B, H, T, D), and the logarithms of the softmax sums that the kernel's backward needs (H, B*T).
    """
    answer, log_sums = _empty_like(q), _log_sums(q)
    ways = _Ways(q, begins, window)
    for _, *some in ways.in_blocks(log_sums, q, k, v, answer):
        _attend_in_blocks(window, *(t[0] for t in some))
    if ways.own:
        assert _own_kernel is not None
        _own_kernel.attend(torch.tensor(ways.own), q, k, v, answer, log_sums)
    kernel = _aten._scaled_dot_product_flash_attention_for_cpu
    with multiplied_by_mkl():
        for some_sums, *some, some_answer in ways.one_by_one(log_sums, q, k, v, answer):
            inputs = [t.to(log_sums.dtype) for t in some]
            found, found_sums = kernel(*inputs, **_causal(inputs[0], window))
            some_answer.copy_(found)
            some_sums.copy_(found_sums)
    return answer, log_sums


@torch.library.custom_op("ftlab::attend_by_document_backward", mutates_args=())
def _backward(
    d_answer: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    answer: Tensor,
    log_sums: Tensor,
    begins: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v."""
    gradients = _empty_like(q), _empty_like(k), _empty_like(v)
    ways = _Ways(q, begins, window)
    for _, *some, _, d_q, d_k, d_v in ways.in_blocks(log_sums, d_answer, q, k, v, answer, *gradients):
        _differentiate_in_blocks(window, *(t[0] for t in (*some, d_q, d_k, d_v)))
    if ways.own:
        assert _own_kernel is not None
        _own_kernel.differentiate(torch.tensor(ways.own), (d_answer, q, k, v, answer), log_sums, gradients)
    kernel = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    with multiplied_by_mkl():
        for some_sums, *some, d_q, d_k, d_v in ways.one_by_one(log_sums, d_answer, q, k, v, answer, *gradients):
            inputs = [t.to(log_sums.dtype) for t in some]
            found = kernel(*inputs, some_sums, dropout_p=0.0, **_causal(inputs[1], window))
            for target, gradient in zip((d_q, d_k, d_v), found, strict=True):
                target.copy_(gradient)
    return gradients


def way_of(dtype: torch.dtype, n_tokens: int, window: int | None) -> str:
    """How a document of ``n_tokens`` is computed: "blocks", "own" or "flash"."""
    own = _own_kernel is not None and _own_kernel.takes(dtype, n_tokens, window)
    if n_tokens >= LONG and multiplied_by_onednn(dtype) and not (own and dtype == torch.bfloat16):
        return "blocks"
    return "own" if own else "flash"


def cpu_kernel_name(dtype: torch.dtype, most_tokens: int, window: int | None) -> str:
    """For the user: what computes documents of up to ``most_tokens``."""
    short, long = (way_of(dtype, n_tokens, window) for n_tokens in (1, most_tokens))
    names = {"own": "own kernel", "flash": "flash"}
    if long == "blocks":
        return f"{names[short]}, documents of {LONG} tokens and more in blocks"
    return names[long] if short == long else f"{names[short]}, {names[long]} for long documents"


class _Ways:
    """The documents of some rows, by how they are computed.

    Attributes:
        own: begin and end, among all tokens, of those that our own kernel takes.
    """

    def __init__(self, q: Tensor, begins: Tensor | None, window: int | None):
        n_rows, _, n_tokens, _ = q.shape
        self._n_rows = n_rows if begins is None else None  # as long as each other: documents that torch takes at once
        starts = range(0, n_rows * n_tokens, n_tokens) if begins is None else begins.flatten().nonzero()[:, 0].tolist()
        found: dict[str, list[tuple[int, int]]] = {"blocks": [], "own": [], "flash": []}
        for start, end in pairwise((*starts, n_rows * n_tokens)):
            found[way_of(q.dtype, end - start, window)].append((start, end))
        self._blocks, self.own, self._flash = found.values()

    def in_blocks(self, log_sums: Tensor, *heads: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Views of each document that is computed in blocks: ``log_sums`` (1, H, L) and the heads (1, H, L, D)."""
        return self._views(self._blocks, log_sums, heads)

    def one_by_one(self, log_sums: Tensor, *heads: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Views of each call of torch's kernel: ``log_sums`` (N, H, L) and the heads (N, H, L, D)."""
        if self._flash and self._n_rows is not None:
            return iter([(log_sums.unflatten(1, (self._n_rows, -1)).transpose(0, 1), *heads)])
        return self._views(self._flash, log_sums, heads)

    @staticmethod
    def _views(
        bounds: list[tuple[int, int]], log_sums: Tensor, heads: tuple[Tensor, ...]
    ) -> Iterator[tuple[Tensor, ...]]:
        flat = [log_sums, *(t.transpose(1, 2).flatten(0, 1).transpose(0, 1) for t in heads)]  # in memory (B, T, H, D)
        for start, end in bounds:
            yield tuple(t[None, :, start:end] for t in flat)


def _attend_in_blocks(window: int | None, q: Tensor, k: Tensor, v: Tensor, answer: Tensor) -> None:
    """Fill ``answer`` (H, T, D) from one document's q (H, T, D), k and v (K, T, D)."""
    v = v.contiguous()
    for rows, keys, p in _probabilities(window, q, k):
        answer[:, rows] = torch.bmm(p.to(v.dtype), v[:, keys]).view_as(answer[:, rows])


def _differentiate_in_blocks(
    window: int | None, d_answer: Tensor, q: Tensor, k: Tensor, v: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor
) -> None:
    """Fill the last three tensors with gradients by one document's q (H, T, D), k and v (K, T, D)."""
    n_kv_heads, scale = len(k), q.shape[-1] ** -0.5
    k, v = k.contiguous(), v.contiguous()
    sums_k, sums_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    for rows, keys, p in _probabilities(window, q, k):
        some_q, d_some = _grouped(q[:, rows], n_kv_heads), _grouped(d_answer[:, rows], n_kv_heads)
        p = p.to(v.dtype)
        sums_v[:, keys] += torch.bmm(p.transpose(1, 2), d_some)
        d_p = torch.bmm(d_some, v[:, keys].transpose(1, 2))
        d_scores = _aten._softmax_backward_data(d_p, p, -1, p.dtype)
        d_q[:, rows] = torch.bmm(d_scores, k[:, keys]).mul_(scale).view_as(d_q[:, rows])
        sums_k[:, keys] += torch.bmm(d_scores.transpose(1, 2), some_q)
    d_k.copy_(sums_k.mul_(scale))
    d_v.copy_(sums_v)


def _probabilities(window: int | None, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of queries, the keys that any of them attends to, and the softmax (K, H/K*R, S) of their scores, float32.

    Args:
        q: (H, T, D).
        k: (K, T, D).
    """
    n_tokens = q.shape[1]
    if window is not None and window >= n_tokens:
        window = None
    n_before = 0 if window is None else window - 1
    q, k = q.float() * q.shape[-1] ** -0.5, k.float().contiguous()
    # Of a window all keys may be masked, otherwise only those of the block itself.
    allowed = torch.ones(_BLOCK, n_before + _BLOCK, dtype=torch.bool).tril_(n_before)
    if window is not None:
        allowed.triu_()
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)
    for start in range(0, n_tokens, _BLOCK):
        end = min(start + _BLOCK, n_tokens)
        rows, keys = slice(start, end), slice(0 if window is None else max(0, start - n_before), end)
        scores = torch.bmm(_grouped(q[:, rows], len(k)), k[:, keys].transpose(1, 2))
        n_rows, n_masked = end - start, min(n_before + end - start, end)
        by_head = scores.unflatten(1, (-1, n_rows))
        by_head[..., -n_masked:] += mask[:n_rows, n_before + n_rows - n_masked : n_before + n_rows]
        yield rows, keys, torch.softmax(scores, dim=-1, out=scores)


def _grouped(heads: Tensor, n_kv_heads: int) -> Tensor:
    """(H, R, D) -> (K, H/K*R, D): queries that share a key head are rows of one matrix."""
    return heads.reshape(n_kv_heads, -1, heads.shape[-1])


def _causal(q: Tensor, window: int | None) -> dict[str, Any]:
    """The kernel's settings for a document of queries (1, H, T, D)."""
    n_tokens = q.shape[2]
    if window is None or window >= n_tokens:
        return {"is_causal": True}
    allowed = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril_().triu_(1 - window)
    mask = torch.zeros(n_tokens, n_tokens, dtype=q.dtype).masked_fill_(~allowed, -torch.inf)
    return {"is_causal": False, "attn_mask": mask}


def _empty_like(heads: Tensor) -> Tensor:
    """(B, H, T, D), in memory (B, T, H, D)."""
    batch, n_heads, n_tokens, head_dim = heads.shape
    return heads.new_empty(batch, n_tokens, n_heads, head_dim).transpose(1, 2)


def _log_sums(q: Tensor) -> Tensor:
    """(H, B*T), in float32 at least."""
    return q.new_zeros(q.shape[1], q.shape[0] * q.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))


@attend_by_document.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_like(q), _log_sums(q)


@_backward.register_fake
def _(d_answer: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return _empty_like(q), _empty_like(k), _empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, begins, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, begins)


def _differentiate(ctx: Any, d_answer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(d_answer, *ctx.saved_tensors, ctx.window), None, None


attend_by_document.register_autograd(_differentiate, setup_context=_keep)
