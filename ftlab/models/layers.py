"""The parts of a decoder block: RMSNorm, grouped-query attention with its key/value cache, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftlab.models.rotary import Rotation

# Queries, keys and values, (B, heads, T, head_dim) each, to what is attended to: a class of `attention.py`.
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
    """Causal self-attention with n_heads queries sharing n_kv_heads keys and values (Ainslie et al. 2023).

    Args:
        qkv_bias: queries, keys and values have one (Qwen2, arXiv:2407.10671).
        qk_norm_eps: of an RMSNorm over every query and key before rotation (Qwen3, arXiv:2505.09388); None: none.
    """

    def __init__(
        self, *, dim: int, n_heads: int, n_kv_heads: int, head_dim: int, qkv_bias: bool, qk_norm_eps: float | None
    ):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(dim, n_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, n_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, n_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.q_norm = nn.Identity() if qk_norm_eps is None else RMSNorm(head_dim, eps=qk_norm_eps)
        self.k_norm = nn.Identity() if qk_norm_eps is None else RMSNorm(head_dim, eps=qk_norm_eps)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend, cache: LayerCache | None = None) -> Tensor:
        """x: (B, T, dim) -> (B, T, dim); with a cache, x holds the T positions after those cached."""
        per_head = (*x.shape[:2], -1, self.head_dim)
        q = rotation(self.q_norm(self.q_proj(x).view(per_head))).transpose(1, 2)
        k = rotation(self.k_norm(self.k_proj(x).view(per_head))).transpose(1, 2)
        v = self.v_proj(x).view(per_head).transpose(1, 2)
        # CUDA's autocast takes norms to float32, and attention has no kernel for float32 queries beside 16-bit values.
        q, k = q.to(v.dtype), k.to(v.dtype)
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
