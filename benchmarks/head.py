"""The loss from hidden states, forward and backward: all logits at once, in chunks, and torch's own fused operation.

    python benchmarks/head.py [--tokens 2048] [--dim 256] [--vocab 32000] [--repeat 5] [--device cpu]

Milliseconds, the fastest and the median of repetitions in turns; and the memory of one, told without data
(``LiveBytes``): what is held beside the inputs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ftlab.distributed.env import keep_freed_memory
from ftlab.losses import ChunkedCrossEntropy, CrossEntropy
from ftlab.models.live_bytes import LiveBytes, live_peaks

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def torchs_own(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch 2.13's operation in chunks, its options left to it."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def both_ways(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """One forward and backward."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss(hidden, weight, targets).backward()


def peak_mib(loss: Loss, n: int, dim: int, vocab: int, dtype: torch.dtype) -> float:
    """Bytes held at once beside the inputs, in MiB."""
    live = LiveBytes()
    live.enter("inputs")
    with FakeTensorMode(allow_fallback_kernels=False), live:
        hidden, weight = torch.empty(n, dim, dtype=dtype), torch.empty(vocab, dim, dtype=dtype)
        targets = torch.zeros(n, dtype=torch.int64)
        inputs = live.live
        live.enter("loss")
        both_ways(loss, hidden, weight, targets)
    return (max(live_peaks(live.phases)) - inputs) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--chunk", type=int, default=1024, help="loss.chunk_tokens")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    keep_freed_memory()
    losses: dict[str, Loss] = {
        "cross_entropy": CrossEntropy(label_smoothing=0.0, z_loss=0.0),
        "chunked_cross_entropy": ChunkedCrossEntropy(label_smoothing=0.0, z_loss=0.0, chunk_tokens=arguments.chunk),
    }
    if hasattr(F, "linear_cross_entropy"):
        losses["torch's, in chunks"] = torchs_own
    n, dim, vocab, device = arguments.tokens, arguments.dim, arguments.vocab, torch.device(arguments.device)
    print(f"{n} tokens, dim {dim}, vocabulary {vocab}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        hidden, weight = torch.randn(n, dim).to(device, dtype), (0.02 * torch.randn(vocab, dim)).to(device, dtype)
        targets = torch.randint(vocab, (n,)).to(device)
        times: dict[str, list[float]] = {name: [] for name in losses}
        for _ in range(arguments.repeat + 1):
            for name, loss in losses.items():
                start = time.perf_counter()
                both_ways(loss, hidden, weight, targets)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times[name].append(1e3 * (time.perf_counter() - start))
        for name, loss in losses.items():
            kept = times[name][1:]  # the first is a warm-up
            told = (
                f"{name:24s} {str(dtype)[6:]:9s} {min(kept):8.0f} ms fastest {statistics.median(kept):8.0f} ms median"
            )
            known = loss is not torchs_own  # which does things that cannot be done without data
            print(told + (f" {peak_mib(loss, n, dim, vocab, dtype):9.0f} MiB" if known else ""), flush=True)


if __name__ == "__main__":
    main()
