"""How a CPU multiplies matrices, where torch's own choice leaves much of it unused.

float32: torch leaves it to MKL, which on AMD's CPUs uses AVX2 even where they have AVX-512, half of what they can do
(MKL 2024.2 on Zen 5). oneDNN uses all of it. torch hands it float32 where float32's precision is "medium", for that
also allows oneDNN to round to bfloat16. It does so with AMX only, which these CPUs do not have, and whether it does is
looked at before it is relied on.

16 bits: oneDNN again, but on CPUs without instructions for them, as most laptops' are, torch has only plain loops: on
Zen 3 a gradient's product runs at 1 GFLOP/s, float32's at 120. There its kernels are replaced, in this process, by ones
that multiply in float32 and round the result, which is what the instructions do. What holds a model, its gradients and
its activations stays in 16 bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel
from torch.utils._python_dispatch import TorchDispatchMode

_float32_by_onednn = False
_widened: dict[torch.dtype, Library] = {}  # kernels stay replaced as long as what registered them lives
_OPERATORS = "mm", "mm.out", "bmm", "bmm.out", "addmm", "addmm.out", "baddbmm", "baddbmm.out"
_FEW = 16  # rows, as of a token that is generated: torch's loops are done before a matrix of weights is widened


def speed_up_products(dtype: torch.dtype) -> None:
    """Choose how matrices of float32 and of ``dtype`` are multiplied in this process from now on."""
    global _float32_by_onednn
    if not _float32_by_onednn and torch.backends.cpu.get_cpu_capability() == "AVX512" and _is_amd():
        torch.set_float32_matmul_precision("medium")
        _float32_by_onednn = _is_float32()
        if not _float32_by_onednn:
            torch.set_float32_matmul_precision("highest")
    if dtype not in _widened and is_widened(dtype):
        _widened[dtype] = Library("aten", "IMPL")
        widen_products(_widened[dtype], dtype)


def is_widened(dtype: torch.dtype) -> bool:
    """Whether matrices of ``dtype`` are multiplied in float32 on this CPU, because it has no other way."""
    return dtype.itemsize == 2 and not multiplied_by_onednn(dtype)


def multiplied_by_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of ``dtype`` in this process."""
    if dtype.itemsize == 2:
        name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
        asked = getattr(torch.ops.mkldnn, name, None)  # absent where torch is built without oneDNN
        return asked is not None and asked()
    return dtype == torch.float32 and _float32_by_onednn


@contextmanager
def multiplied_by_mkl() -> Iterator[None]:
    """For products of small tiles of float32, of which MKL starts more in the same time."""
    if _float32_by_onednn:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if _float32_by_onednn:
            torch.set_float32_matmul_precision("medium")


def widen_products(library: Library, dtype: torch.dtype) -> None:
    """Register through ``library`` kernels that multiply ``dtype`` in float32 and leave the rest to the former ones."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch tells that kernels are replaced
        for name in _OPERATORS:
            kernel = _widening(name.removesuffix(".out"), dtype, get_kernel(f"aten::{name}", "CPU").call_boxed)
            library.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)


def _widening(name: str, dtype: torch.dtype, narrow: Callable[..., Tensor]) -> Callable[..., Tensor]:
    wide = getattr(torch, name)

    def multiply(keys: Any, *tensors: Tensor, out: Tensor | None = None, **scales: float) -> Tensor:
        written = {} if out is None else {"out": out}
        if {t.dtype for t in (*tensors, *written.values())} != {dtype} or tensors[-2].shape[-2] <= _FEW:
            return narrow(keys, *tensors, **scales, **written)
        product = wide(*(t.float() for t in tensors), **scales)
        return product.to(dtype) if out is None else out.resize_(product.shape).copy_(product)

    return multiply


class WidenedProducts(TorchDispatchMode):
    """The same where tensors have shapes and no data, which no kernel sees: the copies in float32 take memory."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        names = [name for name in _OPERATORS if not name.endswith(".out")]
        self._kernels = {
            operator: _widening(name, dtype, lambda _, *tensors, do=operator, **scales: do(*tensors, **scales))
            for name in names
            for operator in [getattr(torch.ops.aten, name).default]
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (kernel := self._kernels.get(func)) is not None:
            return kernel(None, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return False


def _is_float32(multiply: Callable[[Tensor, Tensor], Tensor] = torch.mm) -> bool:
    """Whether products keep what bfloat16, of 8 bits, or TF32, of 11, would lose."""
    x = torch.full((256, 256), 1 + 2**-20)
    one = torch.eye(256)
    return torch.equal(multiply(x, one), x) and torch.equal(multiply(one, x), x)
