"""What this process is and runs on: its rank, its device, and how fast that can multiply matrices."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ftlab.distributed.started import group_of_this_process
from ftlab.errors import ConfigError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

# Dense peak in FLOP/s by (a part of the device's name, dtype), from the vendors' data sheets.
_PEAK_FLOPS = {
    ("H200", torch.bfloat16): 989e12,
    ("H100", torch.bfloat16): 989e12,
    ("A100", torch.bfloat16): 312e12,
    ("RTX 4090", torch.bfloat16): 165e12,
}


@dataclass(frozen=True, kw_only=True)
class WorkerEnv:
    """One process of a run.

    Attributes:
        rank: among all ``world_size`` processes of the run.
        local_rank: among the ``local_world_size`` processes on this machine.
        device: where it computes; on a machine with several GPUs the one of its local rank.
        store: where the processes meet; None: at the address that the environment names.
        in_name_only: the other ranks do not exist: collectives exchange nothing (``training.rehearse``).
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    store: dist.Store | None = None
    in_name_only: bool = False

    @classmethod
    def alone(cls, device_name: str) -> WorkerEnv:
        """The only process of a run."""
        return cls(rank=0, local_rank=0, world_size=1, local_world_size=1, device=pick_device(device_name))

    @classmethod
    def here(cls, device_name: str) -> WorkerEnv:
        """This process as its starter described it in the environment; alone where nobody did.

        Raises:
            ConfigError: for a description that is incomplete or contradicts itself, naming the variable.
        """
        group = group_of_this_process()
        if group is None:
            return cls.alone(device_name)
        device = pick_device(device_name)
        if device.type == "cuda":
            n_gpus = torch.cuda.device_count()
            if group.local_rank >= n_gpus:
                raise ConfigError(
                    "LOCAL_RANK",
                    f"{group.local_rank}, but this machine shows {n_gpus} GPUs",
                    f"as many processes per machine as GPUs: {n_gpus}",
                )
            device = torch.device("cuda", group.local_rank)
        return cls(**group._asdict(), device=device)


def share_cores(local_world_size: int) -> None:
    """Give each of this machine's ranks its share of the cores, unless ``OMP_NUM_THREADS`` says how many to use.

    For this process and those that it starts. torchrun sets the variable itself, to 1.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // local_world_size))
        torch.set_num_threads(max(1, cores // local_world_size))


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
    _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    _mallopt(M_MMAP_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Let glibc return each freed block to the kernel, from the size on that its threshold begins with.

    By itself it raises the threshold to the largest block that was freed. On one heap, the blocks that shards are
    gathered into and that go again leave gaps, which grew a run to 1.4 times what it held (2 ranks, 25 M parameters).
    """
    _mallopt(M_MMAP_THRESHOLD, 128 * 2**10)


def _mallopt(option: int, value: int) -> None:
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(option, value)


def describe_device(device: torch.device, n_ranks: int = 1) -> str:
    """The device for people, and how many such: ``NVIDIA H200 × 4``, ``CPU, 2 threads``."""
    cpu = f"{device.type.upper()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return f"{name} × {n_ranks}" if n_ranks > 1 else name


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
    product = torch.empty_like(a)  # the same each time: new ones would leave the heap full of holes
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    torch.mm(a, b, out=product)  # warm-up: threads, kernel selection
    best, end = float("inf"), time.perf_counter() + budget_s
    while time.perf_counter() < end:
        synchronize()
        start = time.perf_counter()
        torch.mm(a, b, out=product)
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
