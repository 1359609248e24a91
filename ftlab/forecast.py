"""What a configuration will take of memory, whether that is there, and the smallest change that makes it fit."""

from __future__ import annotations

import copy
import logging
import math
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import psutil
import torch

from ftlab.config.build import Config, build
from ftlab.config.check import compose_config
from ftlab.distributed.base import Workers
from ftlab.distributed.fsdp import HSDP
from ftlab.errors import ConfigError, NotEnoughMemoryError
from ftlab.models.config import ModelConfig
from ftlab.training.metrics import GIB, peak_memory_gib
from ftlab.training.rehearse import Rehearsal, Shapes, rehearse

log = logging.getLogger(__name__)

CLEAR_EXCESS = 1.1  # refused above: what is live at once is known exactly, what else wants memory is not
_FEW_BLOCKS, _MARGIN = (2, 4), 1.2  # how a deep model's memory is estimated, and what that may be wrong by
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


def forecast_or_none(config: Config, model: ModelConfig, setting: Setting) -> Rehearsal | None:
    """`forecast`, for a run that goes on without one: not every optimizer can work on tensors without data."""
    try:
        return forecast(config, model, setting)
    except ConfigError:
        raise
    except Exception as error:
        log.debug("no forecast of memory: %s", error, exc_info=True)
        return None


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
        return _with(config, trainer={"batch_size": size})

    def is_too_large(size: int) -> bool:
        found = forecast_or_none(with_size(size), model, setting) if model is not None else None
        if found is None:
            problem = "auto, but there is no forecast of this model's or optimizer's memory"
            raise ConfigError("trainer.batch_size", problem, "trainer.batch_size=1")
        return found.peak * CLEAR_EXCESS > available

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


def refuse_unfit(
    rehearsal: Rehearsal, available: int, config: Config, model: ModelConfig, setting: Setting, device: str
) -> None:
    """Refuse a run that clearly needs more than there is, before anything is loaded.

    Raises:
        NotEnoughMemoryError: with the GiB of every part, those available, and the smallest change that makes it fit.
    """
    needed = max(rehearsal.phases.values())
    if needed <= CLEAR_EXCESS * available:
        return
    parts = {
        "weights": rehearsal.weights,
        "gradients": rehearsal.gradients,
        "optimizer state": rehearsal.optimizer_state,
    }
    told = ", ".join(f"{name} {n_bytes / GIB:.1f}" for name, n_bytes in parts.items())
    rest = (needed - sum(parts.values())) / GIB
    told += f", activations and buffers {rest:.1f}" if rest > 0 else ""
    change = smallest_change(rehearsal, config, model, setting, available)
    raise NotEnoughMemoryError(
        "memory",
        f"each rank needs {needed / GIB:.1f} GiB ({told}), but {device} has {available / GIB:.1f} available",
        " ".join(change.overrides) if change else "a smaller model or seq_len; nothing else makes it fit",
    )


# ------------------------------------------------------------------------------------------- what would fit


@dataclass(frozen=True)
class Change:
    """Overrides that make a run smaller, and the configuration and ranks that they lead to."""

    overrides: list[str]
    config: Config
    n_ranks: int


def smallest_change(
    rehearsal: Rehearsal, config: Config, model: ModelConfig, setting: Setting, available: int
) -> Change | None:
    """The first of `changes` under which the run fits into ``available`` bytes; None if none does.

    Args:
        rehearsal: of the run as it is, which does not fit.
    """
    said: list[str] = []
    size = config["trainer"]["batch_size"]
    if rehearsal.phases["evaluation"] > available and config["evaluation"]["batch_size"] > size:
        said = [f"evaluation.batch_size={size}"]  # costs nothing but a little time, and nothing else helps there
        config = _with(config, evaluation={"batch_size": size})
    unchanged = [Change([], config, setting.n_ranks)] if said else []
    for change in (*unchanged, *changes(config, setting)):
        changed = replace(setting, n_ranks=change.n_ranks, n_local_ranks=min(change.n_ranks, 8))
        if _clearly_unfit(change.config, model, changed, available):
            continue
        found = forecast_or_none(change.config, model, changed)
        if found is not None and found.peak <= available:
            return replace(change, overrides=[*said, *change.overrides])
    return None


def _clearly_unfit(config: Config, model: ModelConfig, setting: Setting, available: int) -> bool:
    """Whether two small models of the same blocks show already that it needs too much: all blocks take seconds."""
    few, more = _FEW_BLOCKS
    if model.n_layers < 2 * more:
        return False
    found = [forecast_or_none(config, model.replace(n_layers=n), setting) for n in _FEW_BLOCKS]
    if found[0] is None or found[1] is None:
        return True
    per_block = (found[1].peak - found[0].peak) / (more - few)
    return found[0].peak + (model.n_layers - few) * per_block > _MARGIN * available


def changes(config: Config, setting: Setting) -> Iterator[Change]:
    """Ways to need less memory, those first that cost least: none of the first changes what is learnt.

    Recomputation costs time; smaller micro-batches cost some of it too; more GPUs cost money; offload costs much time;
    16-bit weights and a simpler optimizer change the result.
    """
    modes = ["none", "selective", "full", "offload"]
    more_recomputed = modes[modes.index(config["parallelism"]["activation_checkpointing"]) + 1 :]
    if not setting.on_cuda and "offload" in more_recomputed:
        more_recomputed.remove("offload")  # there is nowhere to move to
    sizes = list(_smaller_batches(config["trainer"], setting.n_ranks))
    for mode in more_recomputed:
        recomputed = _with(config, parallelism={"activation_checkpointing": mode})
        yield Change([f"parallelism.activation_checkpointing={mode}"], recomputed, setting.n_ranks)
    if config["trainer"]["max_grad_norm"] is None and _with_gradients_kept(config, setting.n_ranks):
        within = _with(config, trainer={"optimizer_in_backward": True})
        yield Change(["trainer.optimizer_in_backward=true"], within, setting.n_ranks)
    for said, trainer in sizes:
        yield Change(said, _with(config, trainer=trainer), setting.n_ranks)
    least = _with(config, parallelism={"activation_checkpointing": "full"})
    said = ["parallelism.activation_checkpointing=full"] if more_recomputed else []
    for more, trainer in sizes:
        yield Change([*said, *more], _with(least, trainer=trainer), setting.n_ranks)
    if sizes:
        least, said = _with(least, trainer=sizes[-1][1]), [*said, *sizes[-1][0]]
    if setting.on_cuda:
        yield from _over_more_ranks([([], config), (said, least)], setting.n_ranks)
    for group, option in (
        ("precision", "bf16_mixed"),
        ("precision", "bf16"),
        ("optimizer", "adamw_8bit"),
        ("optimizer", "sgd"),
    ):
        if config[group] != _option(group, option):
            said = [one for one in said if not one.startswith(f"{group}=")] + [f"{group}={option}"]
            least = least | {group: _option(group, option)}
            yield Change(list(said), least, setting.n_ranks)


def _with_gradients_kept(config: Config, n_ranks: int) -> bool:
    """Whether gradients are kept though nothing needs them together: then they need not be."""
    trainer, alone = build(config["trainer"]), ("ftlab.distributed.single.Single", "ftlab.distributed.fsdp.FSDP")
    return (
        not trainer.optimizer_in_backward
        and trainer.accumulation_steps(n_ranks) == 1
        and config["parallelism"]["_target_"] in alone
        and not config["parallelism"].get("cpu_offload")
        and not config["precision"]["loss_scaling"]
        and config["optimizer"]["_target_"] in ("torch.optim.AdamW", "torch.optim.SGD")
        and trainer.max_skipped_steps == 0
        and trainer.spike_sigma is None
    )


def _smaller_batches(trainer: Config, n_ranks: int) -> Iterator[tuple[list[str], Config]]:
    """Halves of the micro-batch, with as many more of them to a step."""
    size, times = trainer["batch_size"], build(trainer).accumulation_steps(n_ranks)
    while size % 2 == 0:
        size, times = size // 2, times * 2
        said = [f"trainer.batch_size={size}"]
        if trainer["global_batch_size"] is None:
            yield (
                [*said, f"trainer.gradient_accumulation_steps={times}"],
                {
                    "batch_size": size,
                    "gradient_accumulation_steps": times,
                },
            )
        else:
            yield said, {"batch_size": size}


def _over_more_ranks(variants: Sequence[tuple[list[str], Config]], n_ranks: int) -> Iterator[Change]:
    """Each of ``variants`` (what was said, what it led to) sharded over more and more ranks; then offloaded."""
    sharded = _option("parallelism", "fsdp")
    for ranks in (2, 4, 8, 16, 32, 64):
        where = {"nproc_per_node": min(ranks, 8), "nnodes": math.ceil(ranks / 8)}
        over = [f"parallelism.{key}={value}" for key, value in where.items() if value > 1]
        for said, config in variants if ranks >= n_ranks else ():
            kept = {"activation_checkpointing": config["parallelism"]["activation_checkpointing"]}
            yield Change(["parallelism=fsdp", *over, *said], config | {"parallelism": sharded | kept | where}, ranks)
    for said, config in variants:
        kept = {"activation_checkpointing": config["parallelism"]["activation_checkpointing"], "cpu_offload": True}
        overrides = ["parallelism=fsdp", "parallelism.cpu_offload=true", *said]
        yield Change(overrides, config | {"parallelism": sharded | kept}, n_ranks)


@cache
def _option(group: str, name: str) -> Config:
    return compose_config([f"{group}={name}"])[group]


def _with(config: Config, **groups: Config) -> Config:
    changed = copy.copy(config)
    for group, values in groups.items():
        changed[group] = config[group] | values
    return changed


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
