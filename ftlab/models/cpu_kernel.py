"""The kernel of ``kernels/attention.cpp``: compiled for this machine by its C++ compiler, and called."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

_SOURCES = Path(__file__).with_name("kernels")
_LIBRARY = "attention.so"
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
_SIZES = "n_documents", "n_tokens", "n_heads", "n_kv_heads", "head_dim", "n_threads"
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class CompilerError(Exception):
    """There is no C++ compiler, or it refuses."""


class _Documents(ctypes.Structure):
    _fields_ = ("bounds", ctypes.c_void_p), *((size, ctypes.c_int64) for size in _SIZES)


def decided_by() -> list[str]:
    """All that decides what the compiled kernel is: its sources, the compiler, and the CPU as this one sees it.

    Raises:
        CompilerError: when there is no compiler.
    """
    macros = _compile("-dM", "-E", "-x", "c++", "/dev/null")
    return [*(path.read_text(encoding="utf-8") for path in sorted(_SOURCES.iterdir())), " ".join(_FLAGS), macros]


def compile_into(folder: Path) -> None:
    """Compile it, some 4 seconds of one core.

    Raises:
        CompilerError: when that fails.
    """
    _compile(str(_SOURCES / "attention.cpp"), "-o", str(folder / _LIBRARY))


def _compile(*arguments: str) -> str:
    compiler = os.environ.get("CXX") or "g++"  # as torch's own compilation chooses it
    try:
        done = subprocess.run([*compiler.split(), *_FLAGS, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompilerError(f"{compiler}: {error.strerror}") from error
    if done.returncode:
        told = done.stderr.strip().partition("\n")[0] or f"exit code {done.returncode}"
        raise CompilerError(f"{compiler}: {told}")
    return done.stdout


class DocumentKernel:
    """Attention within documents of float32 or bfloat16.

    Heads are (B, H, T, D), in memory (B, T, H, D); ``bounds`` (N, 2) int64 are the begins and ends of documents among
    the B*T tokens.

    Args:
        folder: where it was compiled into.
    """

    # Of a document. Of float32 its gradients then take 3.6 MB of cache, and from 1,024 on torch is as fast; of bfloat16
    # a thread then has 5 to 10 MB of its own.
    MOST_TOKENS: ClassVar = {torch.float32: 512, torch.bfloat16: 2048}

    def __init__(self, folder: Path):
        self._library = ctypes.CDLL(str(folder / _LIBRARY))

    def takes(self, dtype: torch.dtype, n_tokens: int, window: int | None) -> bool:
        """Whether it computes documents of ``n_tokens``."""
        return n_tokens <= self.MOST_TOKENS.get(dtype, 0) and (window is None or window >= n_tokens)

    def attend(self, bounds: Tensor, q: Tensor, k: Tensor, v: Tensor, answer: Tensor, log_sums: Tensor) -> None:
        """Fill the documents' part of ``answer``, and of ``log_sums`` (H, B*T), from q, k and v."""
        self._call("attend", bounds, (q, k), _by_token(q), _by_token(k), _by_token(v), _by_token(answer), log_sums)

    def differentiate(
        self, bounds: Tensor, heads: tuple[Tensor, ...], log_sums: Tensor, gradients: tuple[Tensor, ...]
    ) -> None:
        """Fill the documents' part of ``gradients``, by q, k and v; ``heads``: by the answer, q, k, v, the answer."""
        _, q, k, *_ = heads
        self._call("differentiate", bounds, (q, k), *map(_by_token, heads), log_sums, *map(_by_token, gradients))

    def _call(self, name: str, bounds: Tensor, shaped: tuple[Tensor, Tensor], *tensors: Tensor) -> None:
        (batch, n_heads, n_tokens, head_dim), n_kv_heads = shaped[0].shape, shaped[1].shape[1]
        sizes = (len(bounds), batch * n_tokens, n_heads, n_kv_heads, head_dim, torch.get_num_threads())
        documents = _Documents(bounds.data_ptr(), *sizes)
        call = self._library[f"{name}_{_DTYPES[shaped[0].dtype]}"]
        call(ctypes.byref(documents), *(ctypes.c_void_p(t.data_ptr()) for t in tensors))


def _by_token(heads: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, H, D), which is how it should lie in memory anyway."""
    return heads.transpose(1, 2).contiguous()
