"""A run that needs more memory than there is: refused, with the smallest change that makes it fit."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from ftlab.config.build import Config, build
from ftlab.config.check import compose_config
from ftlab.errors import NotEnoughMemoryError
from ftlab.forecast import CLEAR_EXCESS, Setting, forecast_up_to, with_values
from ftlab.models.config import ModelConfig
from ftlab.training.metrics import GIB
from ftlab.training.rehearse import Rehearsal

log = logging.getLogger(__name__)


def refuse_unfit(
    rehearsal: Rehearsal, available: int, config: Config, model: ModelConfig, setting: Setting, device: str
) -> None:
    """Refuse a run that clearly needs more than there is, before anything is loaded; warn where blocks are compiled.

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
    problem = f"each rank needs {needed / GIB:.1f} GiB ({told}), but {device} has {available / GIB:.1f} available"
    if setting.on_cuda and config["compile"]:
        # Compiled blocks keep up to a third less than is rehearsed, and a GPU that is full ends nothing but the run.
        log.warning("memory: %s; compile=true may make it fit", problem)
        return
    change = smallest_change(rehearsal, config, model, setting, available)
    raise NotEnoughMemoryError(
        "memory",
        problem,
        " ".join(change.overrides) if change else "a smaller model or seq_len; nothing else makes it fit",
    )


@dataclass(frozen=True)
class Change:
    """Overrides that make a run smaller, and the configuration and ranks that they lead to.

    Attributes:
        kind: changes of one kind differ only in their micro-batches and ranks.
    """

    kind: str
    overrides: list[str]
    config: Config
    n_ranks: int

    @property
    def rows(self) -> int:
        """Of a micro-batch."""
        n: int = self.config["trainer"]["batch_size"]
        return n

    @property
    def bytes_of_a_weight(self) -> int:
        weights: torch.dtype = build(self.config["precision"]).weights
        return weights.itemsize


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Bytes that one change takes, for a lower bound of what others take: a forecast for each would take seconds.

    Attributes:
        weights, gradients, optimizer_state: what is kept from step to step.
        first_rest: what the first forward and backward hold beside weights and gradients.
        later_rest: what later steps hold beside all three.
    """

    change: Change
    weights: int
    gradients: int
    optimizer_state: int
    first_rest: int = 0
    later_rest: int = 0

    @classmethod
    def of(cls, change: Change, found: Rehearsal, *, on_cuda: bool) -> Floor:
        """What was ``found`` for ``change``; what is kept on the host is not of the device."""
        kept = (found.weights, found.gradients, found.optimizer_state)
        if on_cuda and change.config["parallelism"].get("cpu_offload"):
            kept = (0, 0, 0)
        weights, gradients, optimizer_state = kept
        return cls(
            change=change,
            weights=weights,
            gradients=gradients,
            optimizer_state=optimizer_state,
            first_rest=found.phases["first forward and backward"] - weights - gradients,
            later_rest=found.phases["later steps"] - sum(kept),
        )

    def for_same_kind(self, other: Change) -> float:
        """A smaller micro-batch has less of what is not kept, and more ranks have smaller shares of all at best."""
        kept = self.weights + self.gradients + self.optimizer_state
        return (kept + self.later_rest * other.rows / self.change.rows) * self.change.n_ranks / other.n_ranks

    def for_other_numbers(self, other: Change, bytes_of_a_weight: int) -> float:
        """For another precision or optimizer: what is not kept is no less than half in any."""
        share = bytes_of_a_weight / self.change.bytes_of_a_weight
        rest = self.first_rest / 2 * other.rows / self.change.rows
        return self.weights * share + max(self.gradients * share, rest)


def smallest_change(
    rehearsal: Rehearsal, config: Config, model: ModelConfig, setting: Setting, available: int
) -> Change | None:
    """The first of `changes` and `changes_of_numbers` under which the run fits into ``available`` bytes, or None.

    Args:
        rehearsal: of the run as it is, which does not fit.
    """
    said: list[str] = []
    size = config["trainer"]["batch_size"]
    if rehearsal.phases["evaluation"] > available and config["evaluation"]["batch_size"] > size:
        said = [f"evaluation.batch_size={size}"]  # costs nothing but a little time, and nothing else helps there
        config = with_values(config, evaluation={"batch_size": size})
    unchanged = Change("unchanged", [], config, setting.n_ranks)
    now = Floor.of(unchanged, rehearsal, on_cuda=setting.on_cuda)
    recomputed = replace(now, first_rest=0, later_rest=0)  # how much of them is left is not known yet
    floors = {"unchanged": now, "in backward": replace(recomputed, gradients=0)}
    floors |= dict.fromkeys(("selective", "full", "offload"), recomputed)
    most_recomputed = "unchanged" if config["parallelism"]["activation_checkpointing"] == "full" else "full"

    def candidates() -> Iterator[Change]:
        if said:
            yield unchanged
        yield from changes(config, setting)
        floor = floors[most_recomputed]
        if floor.for_other_numbers(least(config, setting), bytes_of_a_weight=2) <= available:
            for change in changes_of_numbers(config, setting):
                if floor.for_other_numbers(change, change.bytes_of_a_weight) <= available:
                    yield change

    for change in candidates():
        if change.kind in floors and floors[change.kind].for_same_kind(change) > available:
            continue
        changed = replace(setting, n_ranks=change.n_ranks, n_local_ranks=min(change.n_ranks, 8))
        found = forecast_up_to(available, change.config, model, changed, just_whether=True)
        if found is None:
            continue
        if found.peak <= available:
            return replace(change, overrides=[*said, *change.overrides])
        floors[change.kind] = Floor.of(change, found, on_cuda=setting.on_cuda)
    return None


def changes(config: Config, setting: Setting) -> Iterator[Change]:
    """Ways to need less memory, those first that cost least: none of them changes what is learnt.

    Recomputation costs time; smaller micro-batches cost some of it too; more GPUs cost money; offload costs much time.
    """
    for mode in _more_recomputed(config, setting):
        recomputed = with_values(config, parallelism={"activation_checkpointing": mode})
        yield Change(mode, [f"parallelism.activation_checkpointing={mode}"], recomputed, setting.n_ranks)
    if config["trainer"]["max_grad_norm"] is None and _with_gradients_kept(config, setting.n_ranks):
        within = with_values(config, trainer={"optimizer_in_backward": True})
        yield Change("in backward", ["trainer.optimizer_in_backward=true"], within, setting.n_ranks)
    for said, trainer in _smaller_batches(config["trainer"], setting.n_ranks):
        yield Change("unchanged", said, with_values(config, trainer=trainer), setting.n_ranks)
    yield from _recomputed(config, setting)[1:]
    if setting.on_cuda:
        smallest = least(config, setting)
        yield from _over_more_ranks([([], config), (smallest.overrides, smallest.config)], setting.n_ranks)


def changes_of_numbers(config: Config, setting: Setting) -> Iterator[Change]:
    """More ways, after those of `changes`: 16-bit weights and a simpler optimizer, which change what is learnt."""
    smallest = least(config, setting)
    said, changed = smallest.overrides, smallest.config
    for group, option in (
        ("precision", "bf16_mixed"),
        ("precision", "bf16"),
        ("optimizer", "adamw_8bit"),
        ("optimizer", "sgd"),
    ):
        values = _option(group, option)
        if config[group] != values:
            said = [one for one in said if not one.startswith(f"{group}=")] + [f"{group}={option}"]
            changed = changed | {group: values}
            yield Change(" ".join(said), said, changed, setting.n_ranks)


def least(config: Config, setting: Setting) -> Change:
    """The change of all that are computed on as many ranks and to the same numbers that keeps least of a row."""
    return _recomputed(config, setting)[-1]


def _recomputed(config: Config, setting: Setting) -> list[Change]:
    """Full recomputation, with the micro-batches that there are and with smaller and smaller ones."""
    said = ["parallelism.activation_checkpointing=full"] if _more_recomputed(config, setting) else []
    config = with_values(config, parallelism={"activation_checkpointing": "full"})
    sizes = [([], {}), *_smaller_batches(config["trainer"], setting.n_ranks)]
    return [
        Change("full", [*said, *more], with_values(config, trainer=trainer), setting.n_ranks) for more, trainer in sizes
    ]


def _more_recomputed(config: Config, setting: Setting) -> list[str]:
    modes = ["none", "selective", "full", *(["offload"] if setting.on_cuda else [])]  # a CPU has nowhere to move to
    now = config["parallelism"]["activation_checkpointing"]
    return modes[modes.index(now) + 1 :] if now in modes else []


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
            overrides = ["parallelism=fsdp", *over, *said]
            yield Change(f"fsdp {said}", overrides, config | {"parallelism": sharded | kept | where}, ranks)
    for said, config in variants:
        kept = {"activation_checkpointing": config["parallelism"]["activation_checkpointing"], "cpu_offload": True}
        overrides = ["parallelism=fsdp", "parallelism.cpu_offload=true", *said]
        yield Change(f"offloaded {said}", overrides, config | {"parallelism": sharded | kept}, n_ranks)


def _option(group: str, name: str) -> Config:
    return next(config[group] for chosen, config in _composed() if f"{group}={name}" in chosen)


@cache
def _composed() -> list[tuple[tuple[str, ...], Config]]:
    """All options that changes choose, in as few configurations as hold them: composing takes half a second."""
    together = ("parallelism=fsdp", "precision=bf16", "optimizer=adamw_8bit"), ("precision=bf16_mixed", "optimizer=sgd")
    return [(chosen, compose_config(chosen)) for chosen in together]
