"""What a configuration will take of memory, what there is, and the largest batch that fits."""

from __future__ import annotations

import logging
import math
import sys
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from ftlab.config.build import Config, build
from ftlab.distributed.base import Workers
from ftlab.distributed.fsdp import FSDP, HSDP
from ftlab.errors import ConfigError
from ftlab.models.config import ModelConfig
from ftlab.training.metrics import GIB, peak_memory_gib
from ftlab.training.rehearse import Rehearsal, Shapes, rehearse

log = logging.getLogger(__name__)

CLEAR_EXCESS = 1.1  # refused above: what is live at once is known exactly, what else wants memory is not
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a forecast needs beside the configuration.

    Attributes:
        longest: tokens of the longest training row.
        longest_validation: of the longest validation row; None without any.
        rows, validation_rows: how many there are; None where that is not known.
        n_ranks, n_local_ranks: of the run, of this machine.
        on_cuda: what it runs on.
    """

    longest: int
    longest_validation: int | None
    rows: int | None
    validation_rows: int | None
    n_ranks: int
    n_local_ranks: int
    on_cuda: bool

    def share(self, rows: int | None) -> int:
        """How many of ``rows`` one rank gets at most: no batch has more."""
        return sys.maxsize if rows is None else -(-rows // self.n_ranks)


def forecast(config: Config, model: ModelConfig, setting: Setting) -> Rehearsal:
    """The memory of one rank of the run that ``config`` describes."""
    if setting.on_cuda and _is_deep(config, model):
        return _by_few_blocks(config, model, setting)
    return _rehearsed(config, model, setting)


def forecast_or_none(config: Config, model: ModelConfig, setting: Setting) -> Rehearsal | None:
    """`forecast`, for a run that goes on without one: not every optimizer can work on tensors without data."""
    return _or_none(lambda: forecast(config, model, setting))


def forecast_up_to(
    limit: float, config: Config, model: ModelConfig, setting: Setting, *, just_whether: bool = False
) -> Rehearsal | None:
    """`forecast_or_none`, on a CPU without the holes of the heap where what is live is above ``limit`` bytes already.

    What is live is told by few blocks; the heap of a deep model takes the seconds that all its blocks take.

    Args:
        just_whether: a peak above ``limit`` may be that of a model with fewer blocks.
    """
    if _is_deep(config, model):
        found = _or_none(lambda: _by_few_blocks(config, model, setting, limit if just_whether else math.inf))
        if found is None or found.peak > limit or setting.on_cuda:
            return found
    return forecast_or_none(config, model, setting)


def _or_none(made: Callable[[], Rehearsal]) -> Rehearsal | None:
    try:
        return made()
    except ConfigError:
        raise
    except Exception as error:
        log.debug("no forecast of memory: %s", error, exc_info=True)
        return None


def _is_deep(config: Config, model: ModelConfig) -> bool:
    """Whether few blocks are quicker to rehearse than all."""
    return model.n_layers >= 6 * _first_even(config)


def _first_even(config: Config) -> int:
    """Blocks from which on each further one adds as much: of sharded ones, some are gathered while others work."""
    return 3 if isinstance(build(config["parallelism"]), FSDP) else 1


def _by_few_blocks(config: Config, model: ModelConfig, setting: Setting, limit: float = math.inf) -> Rehearsal:
    """What is live at once in a deep model: in each stretch of a run every block adds as much.

    Args:
        limit: bytes; if fewest blocks are above it, they are the answer.
    """
    n = _first_even(config)
    fewest = _rehearsed(config, model.replace(n_layers=n), setting)
    if max(fewest.phases.values()) > limit:
        return fewest
    found = fewest.towards(_rehearsed(config, model.replace(n_layers=n + 1), setting), model.n_layers - n)
    return replace(found, peak=max(found.phases.values()))


def _rehearsed(config: Config, model: ModelConfig, setting: Setting) -> Rehearsal:
    trainer, evaluation = build(config["trainer"]), build(config["evaluation"])
    validation = setting.longest_validation
    share, validation_share = setting.share(setting.rows), setting.share(setting.validation_rows)
    strategy, n_ranks, n_local_ranks = build(config["parallelism"]), setting.n_ranks, setting.n_local_ranks
    if isinstance(strategy, HSDP):  # what a rank holds is decided by its group; the others only add to its gradients
        _, n_ranks = strategy.mesh_shape(n_ranks, n_local_ranks)
        strategy, n_local_ranks = strategy.one_group(), min(n_ranks, n_local_ranks)
    length = 0 if validation is None else min(validation + evaluation.max_new_tokens, model.max_seq_len)
    return rehearse(
        model,
        precision=build(config["precision"]),
        strategy=strategy,
        n_ranks=n_ranks,
        n_local_ranks=n_local_ranks,
        optimizer=build(config["optimizer"]),
        loss=build(config["loss"]),
        max_grad_norm=trainer.max_grad_norm,
        share_prefixes=trainer.share_prefixes,
        optimizer_in_backward=trainer.optimizer_in_backward,
        shapes=Shapes(
            training=(min(trainer.batch_size, share), setting.longest),
            n_micro_batches=min(trainer.accumulation_steps(setting.n_ranks), -(-share // trainer.batch_size)),
            evaluation=None if validation is None else (min(evaluation.batch_size, validation_share), validation),
            answers=(min(evaluation.n_samples, validation_share), length)
            if validation and evaluation.n_samples
            else None,
        ),
        on_cuda=setting.on_cuda,
    )


def with_batch_size(config: Config, model: ModelConfig | None, setting: Setting, available: int) -> Config:
    """``config``, its ``trainer.batch_size=auto`` made the largest that a forecast fits into ``available`` bytes.

    It divides what is each rank's share of ``trainer.global_batch_size``: which rows a step takes, and its gradient,
    do not depend on what is found.

    Args:
        model: None where there is no forecast.

    Raises:
        ConfigError: the rows cannot be shared equally, or nothing can be forecast.
    """
    trainer = config["trainer"]
    if trainer["batch_size"] != "auto":
        return config
    key, rows = "trainer.global_batch_size", trainer["global_batch_size"]
    if rows % setting.n_ranks:
        nearest = max(1, round(rows / setting.n_ranks)) * setting.n_ranks
        problem = f"{rows} is not a multiple of the {setting.n_ranks} data-parallel ranks"
        raise ConfigError(key, problem, f"{key}={nearest}")
    share = rows // setting.n_ranks
    sizes = [size for size in range(1, share + 1) if share % size == 0]

    def with_size(size: int) -> Config:
        return with_values(config, trainer={"batch_size": size})

    def is_too_large(size: int) -> bool:
        limit = available / CLEAR_EXCESS
        found = None
        if model is not None:
            found = forecast_up_to(limit, with_size(size), model, setting, just_whether=True)
        if found is None:
            problem = "auto, but there is no forecast of this model's or optimizer's memory"
            raise ConfigError("trainer.batch_size", problem, "trainer.batch_size=1")
        return found.peak > limit

    # The smallest is taken where none fits: what helps then is said where that is found out.
    return with_size(sizes[max(0, bisect_left(sizes, True, key=is_too_large) - 1)])


def available_bytes(device: torch.device, n_local_ranks: int) -> int:
    """What one rank can still get: free on its GPU, or its share of what the machine or the container has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    if _CGROUP_LIMIT.is_file() and (limit := _CGROUP_LIMIT.read_text().strip()).isdigit():
        free = min(free, int(limit) - psutil.Process().memory_info().rss)
    return free // n_local_ranks


def with_values(config: Config, **groups: Config) -> Config:
    """A copy of ``config`` in which some keys of some ``groups`` have other values."""
    return config | {group: config[group] | values for group, values in groups.items()}


# ------------------------------------------------------------------------------------------- what it really took


class MemoryMeter:
    """The growth of this process's memory from here on.

    Args:
        device: CUDA: what the allocator gives out; CPU: the resident set, above what it is now.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._start = 0.0
        if device.type != "cuda":
            reset = Path("/proc/self/clear_refs")  # Linux: else the peak of reading the data would stay the peak
            if reset.exists():
                reset.write_text("5")
            self._start = psutil.Process().memory_info().rss / GIB

    def peak_gib(self) -> float:
        """The most so far."""
        return max(0.0, peak_memory_gib(self._device) - self._start)  # what was freed before is used again


def n_workers(config: Config, device: torch.device) -> tuple[int, int]:
    """(ranks of the run, ranks of one machine) that ``config`` starts on a machine like this."""
    settings = build(config["parallelism"])
    if not isinstance(settings, Workers):
        return 1, 1
    n_gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    n_local = settings.nproc_per_node or n_gpus
    return n_local * settings.nnodes, n_local
