"""Causal attention on a CPU, document by document, as one operation.

Its shapes do not depend on the documents, so compiled code calls it whatever they are, and autograd keeps one node for
all of them. Documents take torch's flash kernel in float32, for in 16 bits it needs two to five times as long. Long
ones are quicker in plain matrix products, a block of queries at a time, where oneDNN computes these
(``cpu_products.py``). Scores and softmax stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ftlab.models.cpu_products import multiplied_by_mkl, multiplied_by_onednn

_aten = torch.ops.aten
LONG = 192  # tokens of a document from which on it may be computed in blocks
_BLOCK = 128  # queries of a block: with all their keys, its scores stay in the cache


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
    long, short = _documents(begins, log_sums, q, k, v, answer)
    for _, *some in long:
        _attend_in_blocks(window, *(t[0] for t in some))
    kernel = _aten._scaled_dot_product_flash_attention_for_cpu
    with multiplied_by_mkl():
        for some_sums, *some, some_answer in short:
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
    long, short = _documents(begins, log_sums, d_answer, q, k, v, answer, *gradients)
    for _, *some, _, d_q, d_k, d_v in long:
        _differentiate_in_blocks(window, *(t[0] for t in (*some, d_q, d_k, d_v)))
    kernel = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    with multiplied_by_mkl():
        for some_sums, *some, d_q, d_k, d_v in short:
            inputs = [t.to(log_sums.dtype) for t in some]
            found = kernel(*inputs, some_sums, dropout_p=0.0, **_causal(inputs[1], window))
            for target, gradient in zip((d_q, d_k, d_v), found, strict=True):
                target.copy_(gradient)
    return gradients


def in_blocks(dtype: torch.dtype, n_tokens: int) -> bool:
    """Whether a document of ``n_tokens`` is computed in blocks."""
    return n_tokens >= LONG and multiplied_by_onednn(dtype)


_Documents = list[tuple[Tensor, ...]]


def _documents(begins: Tensor | None, log_sums: Tensor, *tensors: Tensor) -> tuple[_Documents, _Documents]:
    """Views of the documents that are computed in blocks, and of the others.

    Of ``log_sums`` they are (N, H, L), of the other tensors (N, H, L, D); N is 1, but that the kernel takes whole rows
    at once.
    """
    n_rows, _, n_tokens, _ = tensors[0].shape
    if begins is None:
        if not in_blocks(tensors[0].dtype, n_tokens):
            return [], [(log_sums.unflatten(1, (n_rows, n_tokens)).transpose(0, 1), *tensors)]
        lengths = [n_tokens] * n_rows
    else:
        ends = [*begins.flatten().nonzero().flatten().tolist(), n_rows * n_tokens]
        lengths = [end - start for start, end in pairwise(ends)]
    flat = [t.transpose(1, 2).flatten(0, 1).transpose(0, 1) for t in tensors]  # views: in memory (B, T, H, D)
    documents = zip(*(t[None].split(lengths, 2) for t in (log_sums, *flat)), strict=True)
    ways: tuple[_Documents, _Documents] = [], []
    for length, document in zip(lengths, documents, strict=True):
        ways[not in_blocks(tensors[0].dtype, length)].append(document)
    return ways


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
