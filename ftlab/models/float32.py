"""Which library multiplies matrices of float32 on a CPU.

torch leaves them to MKL, which on AMD's CPUs uses AVX2 even where they have AVX-512, half of what they can do (MKL
2024.2 on Zen 5). oneDNN, which torch takes for 16 bits anyway, uses all of it. torch hands it float32 as well where
float32's precision is "medium", for that also allows oneDNN to round to bfloat16. It does so with AMX only, which
these CPUs do not have, and whether it does is looked at before it is relied on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_by_onednn = False


def choose_float32_library() -> None:
    """Let oneDNN multiply float32 in this process from now on, if MKL is slow here."""
    global _by_onednn
    if _by_onednn or torch.backends.cpu.get_cpu_capability() != "AVX512" or not _is_amd():
        return
    torch.set_float32_matmul_precision("medium")
    _by_onednn = _is_float32()
    if not _by_onednn:
        torch.set_float32_matmul_precision("highest")


def multiplied_by_onednn() -> bool:
    """Whether oneDNN multiplies float32 in this process."""
    return _by_onednn


@contextmanager
def multiplied_by_mkl() -> Iterator[None]:
    """For products of small tiles, of which MKL starts more in the same time."""
    if _by_onednn:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if _by_onednn:
            torch.set_float32_matmul_precision("medium")


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return False


def _is_float32() -> bool:
    """Whether products keep what bfloat16, of 8 bits, or TF32, of 11, would lose."""
    x = torch.full((256, 256), 1 + 2**-20)
    one = torch.eye(256)
    return torch.equal(x @ one, x) and torch.equal(one @ x, x)
