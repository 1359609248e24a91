"""Rounding float32 to bfloat16 so that what is lost in one step is not lost on average.

bfloat16 keeps 8 bits: an update below 1/256 of its weight, rounded to the nearest, leaves the weight as it was, in this
step and in every other. Rounded up with the probability of the part that is cut off, it arrives in expectation
(Gupta et al. 2015, arXiv:1502.02551).

The random bits are not drawn from a generator but are a hash of where they are used: parameter, step, element. So they
are the same after a resume and on any number of ranks, and there is no state to save.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK_HIGH = -65536  # 0xFFFF0000


def random_bits(number: Tensor, step: Tensor, start: Tensor, shape: torch.Size) -> Tensor:
    """32 random bits for each element of a piece of a parameter.

    Args:
        number: int32 scalar, of the parameter among all.
        step: scalar that counts.
        start: int32 scalar, position of the piece's first element within the whole parameter, row by row, `wrapped`.
        shape: of the piece, whose elements follow one another.

    Returns:
        int32, of ``shape``, on ``step``'s device.
    """
    key = _mix(_mix(step.to(torch.int32) + number * 0x632BE5AB))
    elements = torch.arange(shape.numel(), dtype=torch.int32, device=step.device) + start
    return _mix(elements.mul_(wrapped(0x9E3779B1)).add_(key)).view(shape)


def more_bits(bits: Tensor) -> Tensor:
    """32 others, from those of `random_bits`, which are left as they are."""
    return _mix(bits + 0x3C6EF372)


def low(bits: Tensor) -> Tensor:
    """The lower 16 of them, in [0, 2**16)."""
    return bits & 0xFFFF


def high(bits: Tensor) -> Tensor:
    """The upper 16 of them, in [0, 2**16)."""
    return (bits >> 16) & 0xFFFF


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """``values``, float32 and finite, as bfloat16: one of the two neighbours, the nearer one more often.

    Args:
        bits: int32 in [0, 2**16), one for each value.
    """
    # Sign and magnitude: adding below the 16 bits that stay carries into them in that share of cases, away from 0.
    return ((values.view(torch.int32) + bits) & _MASK_HIGH).view(torch.float32).bfloat16()


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits in which every bit of the input flips each of the output with about 1/2.

    Chris Wellons' "lowbias32" (nullprogram.com/blog/2018/07/31); shifts of int32 keep the sign, hence the masks.
    """
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * wrapped(0x7FEB352D)
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * wrapped(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def wrapped(number: int) -> int:
    """``number`` modulo 2**32 as an int32."""
    return (number + 2**31) % 2**32 - 2**31
