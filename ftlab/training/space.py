"""Whether the disk will hold what a run is to keep, asked before it begins."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ftlab.errors import ConfigError
from ftlab.storage.checkpoints import Checkpoints
from ftlab.training.checkpoint import CheckpointConfig

_MOST_KEPT = 16  # bytes that an optimizer keeps of a parameter: AdamW in float32 keeps 8


def require_space(
    config: CheckpointConfig,
    checkpoints: Checkpoints,
    n_params: int,
    dtype: torch.dtype,
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    """Refuse to start what could not be saved: the disk must hold all that is to be kept.

    Args:
        n_params: of the model, kept in ``dtype``.
        make_optimizer: its optimizer, for other parameters: what that keeps of each is tried on a small one.

    Raises:
        ConfigError: with both sizes.
    """
    run = checkpoints.folder.parent
    existing = next(folder for folder in (run, *run.parents) if folder.is_dir())
    kept = sum(file.stat().st_size for found in checkpoints.complete() for file in found.path.iterdir())
    free = shutil.disk_usage(existing).free + kept
    weights = n_params * dtype.itemsize
    exported = weights if config.export else 0
    n_kept = config.kept if config.ever else 0
    if free >= n_kept * (weights + n_params * _MOST_KEPT) + exported:
        return  # the first optimizer of a process takes a second to make, for torch loads its compiler
    one = weights + n_params * _optimizer_bytes(dtype, make_optimizer)
    needed = n_kept * one + exported
    if free < needed:
        raise ConfigError(
            "checkpoint.keep_last",
            f"{config.kept} checkpoints of {one / 2**30:.3g} GiB{' and the export' if config.export else ''} need "
            f"{needed / 2**30:.3g} GiB, but {existing} has {free / 2**30:.3g} GiB free",
            "checkpoint.keep_last=1, or paths.output_dir=/a/larger/disk",
        )


def _optimizer_bytes(dtype: torch.dtype, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> float:
    """Bytes that an optimizer keeps for each parameter."""
    probe = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    probe.grad = torch.zeros_like(probe)
    optimizer = make([probe])
    optimizer.step()
    kept = [value for value in optimizer.state[probe].values() if isinstance(value, Tensor) and value.ndim]
    return sum(value.nbytes for value in kept) / probe.numel()
