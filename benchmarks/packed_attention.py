"""Attention over packed rows on this CPU: document by document, as the model does it, or all at once under a mask.

    OMP_NUM_THREADS=1 python benchmarks/packed_attention.py

Milliseconds of a forward and backward of attention alone, 2 rows of 2,048 tokens, 9 query and 3 key heads of 64
(SmolLM2-135M's).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ftlab.models.attention import Causal, Documents

N_ROWS, N_TOKENS, N_HEADS, N_KV_HEADS, HEAD_DIM = 2, 2048, 9, 3, 64


def under_a_mask(doc_ids: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One call of the kernel with a mask of T x T for each row."""
    mask = (doc_ids[:, :, None] == doc_ids[:, None, :]).tril()[:, None]
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def milliseconds(attend: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype) -> float:
    """The fastest of three."""
    shapes = [(N_ROWS, heads, N_TOKENS, HEAD_DIM) for heads in (N_HEADS, N_KV_HEADS, N_KV_HEADS)]
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        attend(q, k, v).sum().backward()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)


def main() -> None:
    print(f"{'document':>8} {'dtype':>9} {'unpacked':>9} {'masked':>9} {'by document':>12}   (ms)")
    for length in (64, 256, 683, 2048):
        for dtype in (torch.float32, torch.bfloat16):
            doc_ids = (torch.arange(N_TOKENS) // length).expand(N_ROWS, -1)
            ways = (Causal(None), under_a_mask(doc_ids), Documents(doc_ids, None))
            row = [milliseconds(way, dtype) for way in ways]
            name = str(dtype).removeprefix("torch.")
            print(f"{length:>8} {name:>9} {row[0]:>9.1f} {row[1]:>9.1f} {row[2]:>12.1f}")


if __name__ == "__main__":
    main()
