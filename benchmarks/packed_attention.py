"""Attention over packed rows on this CPU: all at once under a mask, or document by document, as the model does it, by
torch's kernel or, as under ``compile=true``, by our own.

    OMP_NUM_THREADS=1 python benchmarks/packed_attention.py

Milliseconds of a forward and backward of attention alone, 2 rows of 2,048 tokens, 9 query and 3 key heads of 64
(SmolLM2-135M's).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ftlab.distributed.env import keep_freed_memory
from ftlab.models.attention import Causal, Documents
from ftlab.models.cpu_attention import attend_with
from ftlab.models.cpu_kernel import DocumentKernel, compile_into
from ftlab.models.cpu_products import speed_up_products

N_ROWS, N_TOKENS, N_HEADS, N_KV_HEADS, HEAD_DIM = 2, 2048, 9, 3, 64


def under_a_mask(doc_ids: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One call of the kernel with a mask of T x T for each row."""
    mask = (doc_ids[:, :, None] == doc_ids[:, None, :]).tril()[:, None]
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def milliseconds(attend: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype) -> float:
    """The fastest of five."""
    shapes = [
        (N_ROWS, N_TOKENS, heads, HEAD_DIM) for heads in (N_HEADS, N_KV_HEADS, N_KV_HEADS)
    ]  # as a model makes them
    q, k, v = (torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes)
    d_answer = torch.randn(shapes[0], dtype=dtype).transpose(1, 2)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.autograd.grad(attend(q, k, v), (q, k, v), d_answer)
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)


def main() -> None:
    speed_up_products(torch.float32)
    keep_freed_memory()  # both as in a run
    with tempfile.TemporaryDirectory() as folder:
        compile_into(Path(folder))
        own = DocumentKernel(Path(folder))
    columns = "document", "dtype", "unpacked", "masked", "by document", "own kernel"
    print("".join(f"{column:>12}" for column in columns), "  (ms)")
    for length in (64, 128, 256, 512, 2048):
        for dtype in (torch.float32, torch.bfloat16):
            doc_ids = (torch.arange(N_TOKENS) // length).expand(N_ROWS, -1)
            ways = (Causal(None), under_a_mask(doc_ids), Documents(doc_ids, None))
            row = [milliseconds(way, dtype) for way in ways]
            attend_with(own)
            row.append(milliseconds(ways[-1], dtype))
            attend_with(None)
            name = str(dtype).removeprefix("torch.")
            print(f"{length:>12}{name:>12}" + "".join(f"{ms:>12.1f}" for ms in row))


if __name__ == "__main__":
    main()
