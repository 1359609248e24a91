"""Moments of an optimizer in 8 bits: a code for each value, a scale for each block (Dettmers et al. 2022).

Blocks lie within rows, so that codes and scales are divided over ranks as the rows of their parameter are.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # values that share a scale


def n_blocks(n_columns: int) -> int:
    """Scales of a row."""
    return -(-n_columns // BLOCK)


def encode(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Nearest codes and the scales for ``values``: (R, C) float32 -> (R, C) uint8, (R, n_blocks) float32."""
    n_rows, n_columns = values.shape
    padded = F.pad(values, (0, -n_columns % BLOCK)).view(n_rows, -1, BLOCK)
    scales = padded.abs().amax(-1)
    relative = padded / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    borders = torch.tensor(_borders(signed), device=values.device)  # made anew: one kept from a rehearsal has no data
    codes = torch.bucketize(relative, borders, out_int32=True).to(torch.uint8)
    return codes.flatten(1)[:, :n_columns], scales


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """What `encode` kept of the values, (R, C) float32."""
    n_rows, n_columns = codes.shape
    relative = torch.tensor(_levels(signed), device=codes.device)[codes.int()]
    padded = F.pad(relative, (0, -n_columns % BLOCK)).view(n_rows, -1, BLOCK)
    return (padded * scales[..., None]).flatten(1)[:, :n_columns]


@cache
def _levels(signed: bool) -> tuple[float, ...]:
    """The 256 values, in [-1, 1] or [0, 1], ascending: a dynamic exponent, the remaining bits a fraction.

    Of every decade below 1 twice as many as of the one below it, down to 1e-7: relative precision where it counts
    (arXiv:1511.04561, and arXiv:2110.02861 for optimizers).
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        n = 2**exponent if signed else 2 ** (exponent + 1)
        decade = [(0.1 + 0.9 * (i + 0.5) / n) * 10.0 ** (exponent - 6) for i in range(n)]
        levels += [*decade, *(-level for level in decade if signed)]
    return tuple(sorted(levels))


@cache
def _borders(signed: bool) -> tuple[float, ...]:
    """Half way between neighbours."""
    return tuple((low + high) / 2 for low, high in pairwise(_levels(signed)))
