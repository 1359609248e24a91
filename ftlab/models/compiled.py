"""Compiled blocks: each decoder block's operations between matrix products become few kernels."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as symbolic_shapes

from ftlab.errors import ConfigError


def require_compiler(device: torch.device) -> None:
    """Refuse a machine that has nothing to compile with.

    torch writes C++ for a CPU; for a GPU Triton needs a C compiler to build what launches its kernels.

    Raises:
        ConfigError: with what was looked for.
    """
    if device.type == "cpu":
        variable, usual = "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    else:
        variable, usual = "CC", ["gcc", "clang"]
    asked = os.environ.get(variable)
    names = [asked.split()[0]] if asked and asked.strip() else usual
    if not any(shutil.which(name) for name in names):
        wanted = f"{' or '.join(names)}{f' (from {variable})' if asked else ''}"
        raise ConfigError(
            "compile", f"true needs a compiler, but there is no {wanted} on this machine", "compile=false"
        )


def compile_blocks(model: nn.Module, *, varying: bool, batch_size: int) -> None:
    """Compile the forward of each of ``model.blocks``, and with it the backward, at their first use.

    Block by block, not the model: all blocks are one piece of code, so it is compiled once, which takes seconds
    where a whole model takes minutes. Names of parameters stay. It comes last, after recomputation and sharding:
    what is compiled includes the one, and the other's hooks stay outside, around it.

    Args:
        varying: whether the first compilation already is for batches of all shapes, not for the one that there is.
        batch_size: rows of a micro-batch, but for an epoch's last.
    """
    # Else as many rows as a head is wide, by chance, would be taken for the width, which does not vary.
    symbolic_shapes.use_duck_shape = False
    for block in model.get_submodule("blocks").children():
        compiled = torch.compile(block.forward, dynamic=True if varying else None)
        block.forward = _unless_rare(block.forward, compiled, batch_size)


def _unless_rare(plain: Callable[..., Any], compiled: Callable[..., Any], batch_size: int) -> Callable[..., Any]:
    """``compiled``, but ``plain`` where a compilation of its own would be needed for a moment."""

    def forward(x: Any, *others: Any, cache: Any = None, **named: Any) -> Any:
        # A cache of keys is longer with every token that is generated, and so would be another shape to compile for.
        if cache is not None:
            return plain(x, *others, cache=cache, **named)
        # torch takes 1 for a size that does not vary: this is an epoch's last row, left alone, or the only token of a
        # rank that has no row left.
        if (len(x) == 1 < batch_size or x.shape[1] == 1) and torch.is_grad_enabled():
            return plain(x, *others, **named)
        return compiled(x, *others, **named)

    return forward
