"""Rotary position embedding: tables of angles, their stretching for long contexts, and the rotation itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from ftlab.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Slower rotation for contexts longer than those of pretraining (Llama 3.1, arXiv:2407.21783).

    Waves shorter than ``original_max_seq_len / high_freq_factor`` stay as they are, those longer than
    ``original_max_seq_len / low_freq_factor`` become ``factor`` times longer, and in between it is mixed.

    Args:
        original_max_seq_len: tokens; longest sequence before the stretching.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ConfigError(f"model.rope_scaling.{key}", f"{value!r} is not a number above 0")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                "model.rope_scaling.high_freq_factor",
                f"{self.high_freq_factor} is not above model.rope_scaling.low_freq_factor={self.low_freq_factor}",
                fix=f"model.rope_scaling.high_freq_factor={4 * self.low_freq_factor}",
            )

    def __call__(self, frequencies: Tensor) -> Tensor:
        """Radians per token, (head_dim / 2,), to the same stretched."""
        waves_in_context = self.original_max_seq_len * frequencies / (2 * math.pi)
        kept = (waves_in_context - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(frequencies / self.factor, frequencies, kept.clamp(0.0, 1.0))


class Rotation:
    """Cosines and sines of positions, ([B,] T, head_dim / 2) float32; calling it rotates queries or keys.

    A plain class on purpose: FSDP2 casts every tensor it finds in a block's arguments, in tuples and
    dataclasses too, to the compute dtype, and in bfloat16 neighbouring positions far into a sequence have the
    same angle.
    """

    def __init__(self, cos: Tensor, sin: Tensor):
        self.cos, self.sin = cos, sin

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x: (B, T, H, head_dim), computed in float32 and returned in x's dtype.

        Pairs are (i, i + head_dim / 2), the convention of Hugging Face's weights; Meta's pairs (2i, 2i + 1)
        are brought to it when their weights are read (``ftlab/models/layouts.py``).
        """
        cos, sin = self.cos.unsqueeze(-2), self.sin.unsqueeze(-2)
        first, second = x.chunk(2, dim=-1)
        halves = first * cos - second * sin, second * cos + first * sin
        return torch.cat([half.to(x.dtype) for half in halves], dim=-1)  # rounded before they are written together


class RotaryEmbedding(nn.Module):
    """Table of rotation angles (Su et al. 2021, arXiv:2104.09864) for positions 0 .. max_seq_len - 1.

    The tables are a function of a few numbers, so they are never saved, never cast and never left
    uninitialised: every move of the module (``to_empty`` from meta, ``.to(bfloat16)``, ``.cuda()``)
    recomputes them in float32 on the CPU, which also makes them the same bits on every device.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_seq_len: int, theta: float, scaling: Llama3RopeScaling | None):
        super().__init__()
        self.head_dim, self.max_seq_len, self.theta, self.scaling = head_dim, max_seq_len, theta, scaling
        self.register_buffer("cos", torch.empty(max_seq_len, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(max_seq_len, head_dim // 2), persistent=False)
        self._fill_tables()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._fill_tables()
        return self

    def _fill_tables(self) -> None:
        device = self.cos.device
        if device.type == "meta":
            return
        with torch.device("cpu"):
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
            frequencies = 1.0 / self.theta**exponents
            if self.scaling is not None:
                frequencies = self.scaling(frequencies)
            angles = torch.outer(torch.arange(self.max_seq_len, dtype=torch.float32), frequencies)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)

    def forward(self, positions: slice | Tensor) -> Rotation:
        """The rotation of a run of positions (views, no copy), or of those in a tensor (B, T)."""
        return Rotation(self.cos[positions], self.sin[positions])
