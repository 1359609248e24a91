"""The fused SGD kernel for sharded parameters: torch registers the fused Adams with DTensor, but not SGD."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding


@cache
def teach_dtensor_fused_sgd() -> None:
    """Let ``torch.optim.SGD(fused=True)`` step on DTensors; the same for every process that calls it.

    The update is elementwise: on equally sharded parameters, gradients and momenta each rank updates its rows.
    ``found_inf`` and ``grad_scale``, scalars, are the same on all ranks.
    """
    aten = torch.ops.aten
    # Stubs type the decorator's argument as a list of one kind of overload.
    overloads: Any = [aten._fused_sgd_.default, aten._fused_sgd_.tensor_lr]
    register_sharding(overloads)(_elementwise)


def _elementwise(parameters: Any, gradients: Any, momenta: Any, **scalars: Any) -> list[tuple[list[Any], list[Any]]]:
    """Placements that the kernel accepts along one axis of the mesh: all lists alike."""
    n_tensors = sum(len(tensors) for tensors in (parameters, gradients, momenta))
    n_scalars = sum(hasattr(value, "placements") for value in scalars.values())
    return [([], [placement] * n_tensors + [Replicate()] * n_scalars) for placement in (Replicate(), Shard(0))]
