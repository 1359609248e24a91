"""Compiled blocks: each decoder block's operations between matrix products become few kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def compile_blocks(model: nn.Module, *, varying: bool) -> None:
    """Compile the forward of each of ``model.blocks``, and with it the backward, at their first use.

    Block by block, not the model: all blocks are one piece of code, so it is compiled once, which takes seconds
    where a whole model takes minutes. Names of parameters stay. It comes last, after recomputation and sharding:
    what is compiled includes the one, and the other's hooks stay outside, around it.

    Args:
        varying: whether the shape of a batch changes from step to step. Then the first compilation already is for
            all shapes; otherwise it is for the one that there is, which is a little faster.
    """
    for block in model.get_submodule("blocks").children():
        block.forward = _unless_cached(block.forward, torch.compile(block.forward, dynamic=True if varying else None))


def _unless_cached(plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def forward(x: Any, *others: Any, cache: Any = None, **named: Any) -> Any:
        # A cache of keys is longer with every token that is generated, and so would be another shape to compile for.
        if cache is not None:
            return plain(x, *others, cache=cache, **named)
        return compiled(x, *others, **named)

    return forward
