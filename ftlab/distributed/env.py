"""What this process runs on: the device, and how fast it can multiply matrices."""

from __future__ import annotations

import ctypes
import time

import torch

from ftlab.errors import ConfigError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

# Dense peak in FLOP/s by (a part of the device's name, dtype), from the vendors' data sheets.
_PEAK_FLOPS = {
    ("H200", torch.bfloat16): 989e12,
    ("H100", torch.bfloat16): 989e12,
    ("A100", torch.bfloat16): 312e12,
    ("RTX 4090", torch.bfloat16): 165e12,
}


def pick_device(name: str) -> torch.device:
    """``auto`` takes the first CUDA device if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device",
            f"{name} was asked for, but torch {torch.__version__} finds no CUDA device here",
            "device=cpu",
        )
    return device


def keep_freed_memory() -> None:
    """Let glibc keep big freed blocks for the next step instead of returning them to the kernel.

    Logits and activations of a step are the same size as those of the step before; fetching fresh, zeroed pages
    for them each time cost 20 to 50 % (``benchmarks/step.py model.vocab_size=32000 seq_len=256``, 2 cores).
    Elsewhere (macOS, musl) there is no ``mallopt``, and nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(option, 2**31 - 1)


def describe_device(device: torch.device) -> str:
    """The device for people: ``NVIDIA H200``, ``CPU, 2 threads``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Matrix-product peak of the device in FLOP/s: the data sheet's for known GPUs, otherwise measured in ~0.2 s."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        # float16 and bfloat16 run at the same rate on all listed chips.
        key = torch.bfloat16 if dtype in (torch.float16, torch.bfloat16) else dtype
        for (part, listed), flops in _PEAK_FLOPS.items():
            if part in name and listed == key:
                return flops
    return _measure_matmul_peak(device, dtype)


def _measure_matmul_peak(device: torch.device, dtype: torch.dtype, *, budget_s: float = 0.2) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    a @ b  # warm-up: threads, kernel selection
    best, end = float("inf"), time.perf_counter() + budget_s
    while time.perf_counter() < end:
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
