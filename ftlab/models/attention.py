"""Which tokens a token may attend to, and the kernels that compute it: whole rows, or rows packed with documents."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from ftlab.models.config import ModelConfig
from ftlab.models.cpu_attention import attend_by_document, cpu_kernel_name
from ftlab.prefixes import Tree


class Causal:
    """Every token attends to itself and to what stands before it in its row.

    Like ``Documents`` called with q: (B, n_heads, T, head_dim) and k, v: (B, n_kv_heads, S, head_dim), of which q
    are the last T of S positions; returns (B, n_heads, T, head_dim).

    Args:
        window: tokens that one attends to, itself included (Mistral, arXiv:2310.06825); None: all.
    """

    def __init__(self, window: int | None):
        self._window = window

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._window is not None and q.shape[2] == 1:  # a newly generated token: the last keys are its window
            k, v = k[:, :, -self._window :], v[:, :, -self._window :]
        n_queries, n_keys = q.shape[2], k.shape[2]
        if q.device.type == "cpu" and n_queries > 1 and n_queries == n_keys:
            answer: Tensor = attend_by_document(q, k, v, None, self._window)[0]
            return answer
        mask = None
        windowed = self._window is not None and self._window < n_keys
        # A chunk after a filled cache needs one too: is_causal would align it with the first keys.
        if n_queries > 1 and (windowed or n_queries < n_keys):
            mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_queries)
            if self._window is not None:
                mask = mask.triu(n_keys - n_queries - self._window + 1)
        grouped = q.shape[1] != k.shape[1]
        if grouped and not _reads_grouped_heads(q, mask):
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            grouped = False
        is_causal = False
        if mask is None and n_queries > 1:  # a branch: compiled for any length, a comparison is no bool yet
            is_causal = True
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)


def _reads_grouped_heads(q: Tensor, mask: Tensor | None) -> bool:
    """Whether a fused SDPA kernel takes fewer key heads than query heads as they are.

    torch 2.11 to 2.13: the CPU kernel does; on CUDA only flash does (16 bit, no mask, sm80 or newer),
    everything else would fall silently to the kernel that writes out all T x T scores, so there K and V are
    repeated first.
    """
    if q.device.type == "cpu":
        return True
    flash = q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) >= (8, 0)
    return flash and mask is None and q.dtype in (torch.bfloat16, torch.float16)


def kernel_name(config: ModelConfig, seq_len: int, dtype: torch.dtype, device: torch.device, *, packed: bool) -> str:
    """Which kernel computes attention for rows of ``seq_len``: torch's own choice, asked once and told the user."""
    if packed and device.type == "cuda":
        return "flex attention, compiled"
    if device.type == "cpu":
        name = cpu_kernel_name(dtype, seq_len, config.sliding_window)
        return f"{name}, a call per document" if packed and "flash" in name else name
    assert config.head_dim is not None  # ModelConfig resolved them
    assert config.n_kv_heads is not None
    heads = (config.n_heads, config.n_kv_heads)
    q, k = (torch.empty(1, n, 2, config.head_dim, dtype=dtype, device=device) for n in heads)
    masked = config.sliding_window is not None and config.sliding_window < seq_len
    mask = torch.ones(2, 2, dtype=torch.bool, device=device) if masked else None
    grouped = heads[0] != heads[1]
    if grouped and not _reads_grouped_heads(q, mask):
        k, grouped = q, False
    choice = SDPBackend(torch._fused_sdp_choice(q, k, k, mask, is_causal=not masked, enable_gqa=grouped))
    name = choice.name.removesuffix("_ATTENTION").lower().replace("_", " ")
    return f"{name}, a call per document" if packed else name


class Documents:
    """Rows packed with documents, none of which sees another; each is attended to like a row of its own.

    On a CPU one document after the other: the work is the sum of their squared lengths, where one
    call with a mask would compute the square of the row's. On CUDA flex attention, which skips the blocks of
    the mask that are empty: its shapes are the row's, whatever documents are in it, so nothing is compiled
    anew, and the host never waits to learn the lengths.

    Args:
        doc_ids: (B, T) int; a document is a run of equal ids in a row. Padding is one with an id of its own.
        window: as in ``Causal``.

    Attributes:
        positions: (B, T) int64, each token's place in its document.
    """

    def __init__(self, doc_ids: Tensor, window: int | None):
        begins = torch.ones_like(doc_ids, dtype=torch.bool)
        begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
        places = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand_as(doc_ids)
        self.positions = places - places.masked_fill(~begins, 0).cummax(dim=1).values
        self._begins, self._window = begins, window
        if doc_ids.device.type == "cuda":
            self._mask = _block_mask(begins.cumsum(dim=1), window)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cuda":
            from torch.nn.attention.flex_attention import flex_attention

            attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)
            return attend(q, k, v, block_mask=self._mask, enable_gqa=q.shape[1] != k.shape[1])
        answer: Tensor = attend_by_document(q, k, v, self._begins, self._window)[0]
        return answer


class FoldedDocuments:
    """Documents of which what they begin with in common is computed once: they are put together, and attended to.

    Called with q, k and v of the tree's nodes, (1, heads, U, head_dim) each; returns as much as q.

    Args:
        documents: in the tree's N places.
    """

    def __init__(self, documents: Documents, tree: Tree):
        self._documents, self._tree = documents, tree
        self.positions = documents.positions[:, tree.nodes.rows]  # (1, U)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        whole = (self._tree.tokens(heads[0].transpose(0, 1)).transpose(0, 1)[None] for heads in (q, k, v))
        answer = self._documents(*whole)
        return self._tree.nodes(answer[0].transpose(0, 1)).transpose(0, 1)[None]


def _block_mask(documents: Tensor, window: int | None) -> Any:
    """Flex attention's mask for ``documents`` (B, T), the number of each token's document in its row."""
    from torch.nn.attention.flex_attention import create_block_mask  # 0.3 s, and only CUDA needs it

    def may_attend(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 -- flex's signature
        allowed = (query >= key) & (documents[row, query] == documents[row, key])
        return allowed if window is None else allowed & (query - key < window)

    n_rows, n_tokens = documents.shape
    create = _compiled(create_block_mask) if documents.is_cuda else create_block_mask
    return create(may_attend, n_rows, None, n_tokens, n_tokens, device=documents.device)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once: as it is, flex attention would write out all T x T scores, and its mask's maker all places."""
    return torch.compile(function)
