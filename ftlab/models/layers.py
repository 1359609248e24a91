"""The parts of a Llama-family block: RMSNorm, rotary embedding, grouped-query attention, SwiGLU, key/value cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Queries, keys and values, (B, heads, T, head_dim) each, to what is attended to: `Causal` or `Documents`.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) with the gain brought to the input's dtype.

    Under FSDP with mixed precision a block's gains arrive in the compute dtype while the residual stream is in
    float32, and torch has a fused kernel for equal dtypes only. Bitwise equal to transformers' in float32; in
    bfloat16 it rounds once where transformers rounds twice (before and after the gain), and so is closer to the
    exact value.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., dim) -> (..., dim)."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


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
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Table of rotation angles (Su et al. 2021, arXiv:2104.09864) for positions 0 .. max_seq_len - 1.

    The tables are a function of three numbers, so they are never saved, never cast and never left
    uninitialised: every move of the module (``to_empty`` from meta, ``.to(bfloat16)``, ``.cuda()``)
    recomputes them in float32 on the CPU, which also makes them the same bits on every device.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_seq_len: int, theta: float):
        super().__init__()
        self.head_dim, self.max_seq_len, self.theta = head_dim, max_seq_len, theta
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
            angles = torch.outer(torch.arange(self.max_seq_len, dtype=torch.float32), 1.0 / self.theta**exponents)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)

    def forward(self, positions: slice | Tensor) -> Rotation:
        """The rotation of a run of positions (views, no copy), or of those in a tensor (B, T)."""
        return Rotation(self.cos[positions], self.sin[positions])


class LayerCache:
    """Keys and values of one layer, (B, n_kv_heads, capacity, head_dim) each, allocated at the first append.

    Allocated late so that dtype and device are those attention computes in (under autocast not the
    parameters').
    """

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the next T positions, (B, n_kv_heads, T, head_dim) each; return all so far (views)."""
        if self._keys is None or self._values is None:
            batch, heads, _, head_dim = keys.shape
            self._keys = keys.new_empty(batch, heads, self.capacity, head_dim)
            self._values = torch.empty_like(self._keys)
        start, self.length = self.length, self.length + keys.shape[2]
        assert self.length <= self.capacity, f"key/value cache of {self.capacity} positions is full"
        self._keys[:, :, start : self.length] = keys
        self._values[:, :, start : self.length] = values
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]


class KVCache:
    """One `LayerCache` per decoder block; ``length`` positions are filled of ``capacity``."""

    def __init__(self, n_layers: int, capacity: int):
        self.layers = [LayerCache(capacity) for _ in range(n_layers)]

    @property
    def length(self) -> int:
        return self.layers[0].length


class Attention(nn.Module):
    """Causal self-attention with n_heads queries sharing n_kv_heads keys and values (Ainslie et al. 2023)."""

    def __init__(self, *, dim: int, n_heads: int, n_kv_heads: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend, cache: LayerCache | None = None) -> Tensor:
        """x: (B, T, dim) -> (B, T, dim); with a cache, x holds the T positions after those cached."""
        per_head = (*x.shape[:2], -1, self.head_dim)
        q = rotation(self.q_proj(x).view(per_head)).transpose(1, 2)
        k = rotation(self.k_proj(x).view(per_head)).transpose(1, 2)
        v = self.v_proj(x).view(per_head).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward (Shazeer 2020, arXiv:2002.05202); (B, T, dim) -> (B, T, dim)."""

    def __init__(self, *, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
