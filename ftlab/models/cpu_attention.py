"""Causal attention on a CPU, document by document, as one operation.

Its shapes do not depend on the documents, so compiled code calls it whatever they are, and autograd keeps one node for
all of them. Short documents take torch's flash kernel, in float32: in 16 bits it needs two to five times as long.
For long ones its small tiles cost more than they save: blocks of queries in plain matrix products take little more
than half its time, and in 16 bits are closer to the exact gradients, since scores and softmax stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
LONG = 128  # tokens of a document from which on it is computed in blocks
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
        The answer (B, H, T, D), and for backward the logarithms of short documents' softmax sums (H, B*T).
    """
    answer, log_sums = _empty_like(q), _log_sums(q)
    for some_sums, (*some, some_answer) in _documents(begins, log_sums, q, k, v, answer):
        if some_answer.shape[2] < LONG:
            inputs = [t.to(log_sums.dtype) for t in some]
            kernel = _aten._scaled_dot_product_flash_attention_for_cpu
            found, found_sums = kernel(*inputs, **_causal(inputs[0], window))
            some_answer.copy_(found)
            some_sums.copy_(found_sums)
        else:
            _attend_in_blocks(window, *(t[0] for t in (*some, some_answer)))
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
    for some_sums, (*some, d_q, d_k, d_v) in _documents(begins, log_sums, d_answer, q, k, v, answer, *gradients):
        if d_q.shape[2] < LONG:
            inputs = [t.to(log_sums.dtype) for t in some]
            kernel = _aten._scaled_dot_product_flash_attention_for_cpu_backward
            found = kernel(*inputs, some_sums, dropout_p=0.0, **_causal(inputs[1], window))
            for target, gradient in zip((d_q, d_k, d_v), found, strict=True):
                target.copy_(gradient)
        else:
            _differentiate_in_blocks(window, *(t[0] for t in (*some[:4], d_q, d_k, d_v)))
    return gradients


def _documents(begins: Tensor | None, log_sums: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Views of documents that are computed together: of ``log_sums`` (N, H, L), of the others (N, H, L, D).

    N is 1, but that short whole rows are taken at once.
    """
    n_rows, _, n_tokens, _ = tensors[0].shape
    if begins is None and n_tokens < LONG:
        yield log_sums.unflatten(1, (n_rows, n_tokens)).transpose(0, 1), list(tensors)
        return
    if begins is None:
        starts = list(range(0, n_rows * n_tokens, n_tokens))
    else:
        starts = begins.flatten().nonzero().flatten().tolist()
    flat = [t.transpose(1, 2).flatten(0, 1).transpose(0, 1) for t in tensors]  # views: in memory (B, T, H, D)
    for start, end in zip(starts, [*starts[1:], n_rows * n_tokens], strict=True):
        yield log_sums[None, :, start:end], [t[None, :, start:end] for t in flat]


def _attend_in_blocks(window: int | None, q: Tensor, k: Tensor, v: Tensor, answer: Tensor) -> None:
    """Fill ``answer`` (H, T, D) from one document's q (H, T, D), k and v (K, T, D)."""
    n_kv_heads, wide = len(k), torch.promote_types(q.dtype, torch.float32)
    v, wide_k = v.contiguous(), k.to(wide).contiguous()
    for rows, keys in _blocks(q.shape[1], window):
        p = _probabilities(_grouped(q[:, rows], n_kv_heads).to(wide), wide_k[:, keys], rows, keys, window)
        answer[:, rows] = torch.bmm(p.to(v.dtype), v[:, keys]).view_as(answer[:, rows])


def _differentiate_in_blocks(
    window: int | None, d_answer: Tensor, q: Tensor, k: Tensor, v: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor
) -> None:
    """Fill the last three tensors with gradients by one document's q (H, T, D), k and v (K, T, D)."""
    n_kv_heads, wide = len(k), torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5
    k, v, wide_k = k.contiguous(), v.contiguous(), k.to(wide).contiguous()
    sums_k, sums_v = torch.zeros_like(wide_k), torch.zeros_like(wide_k)
    for rows, keys in _blocks(q.shape[1], window):
        some_q, d_some = _grouped(q[:, rows], n_kv_heads), _grouped(d_answer[:, rows], n_kv_heads)
        p = _probabilities(some_q.to(wide), wide_k[:, keys], rows, keys, window)
        sums_v[:, keys] += torch.bmm(p.to(q.dtype).transpose(1, 2), d_some)
        d_p = torch.bmm(d_some, v[:, keys].transpose(1, 2)).to(wide)
        d_scores = _aten._softmax_backward_data(d_p, p, -1, wide).to(q.dtype)
        d_q[:, rows] = torch.bmm(d_scores, k[:, keys]).mul_(scale).view_as(d_q[:, rows])
        sums_k[:, keys] += torch.bmm(d_scores.transpose(1, 2), some_q)
    d_k.copy_(sums_k.mul_(scale))
    d_v.copy_(sums_v)


def _blocks(n_tokens: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Queries of each block, and the keys that any of them attends to."""
    for start in range(0, n_tokens, _BLOCK):
        end = min(start + _BLOCK, n_tokens)
        yield slice(start, end), slice(0 if window is None else max(0, start - window + 1), end)


def _grouped(heads: Tensor, n_kv_heads: int) -> Tensor:
    """(H, R, D) -> (K, H/K*R, D): queries that share a key head are rows of one matrix."""
    return heads.reshape(n_kv_heads, -1, heads.shape[-1])


def _probabilities(q: Tensor, k: Tensor, rows: slice, keys: slice, window: int | None) -> Tensor:
    """Softmax (K, G*R, S) of the scores of grouped queries (K, G*R, D), tokens ``rows``, and ``k`` (K, S, D)."""
    n_rows, n_keys = rows.stop - rows.start, keys.stop - keys.start
    mask = _mask(n_rows, n_keys, rows.start - keys.start, window, q.dtype).repeat(q.shape[1] // n_rows, 1)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.softmax(scores, dim=-1, out=scores)


def _mask(n_rows: int, n_keys: int, first: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """(n_rows, n_keys): 0 where the query in row i, which is key ``first`` + i, may attend to a key, else -inf."""
    allowed = torch.ones(n_rows, n_keys, dtype=torch.bool).tril_(first)
    if window is not None:
        allowed.triu_(first + 1 - window)
    return torch.zeros(n_rows, n_keys, dtype=dtype).masked_fill_(~allowed, -torch.inf)


def _causal(q: Tensor, window: int | None) -> dict[str, Any]:
    """The kernel's settings for a document of queries (1, H, T, D)."""
    n_tokens = q.shape[2]
    if window is None or window >= n_tokens:
        return {"is_causal": True}
    return {"is_causal": False, "attn_mask": _mask(n_tokens, n_tokens, 0, window, q.dtype)}


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
