"""Does spreading a run over processes change what it computes? Measured on the user's own configuration."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ftlab.assembly.experiment import assemble
from ftlab.config.build import Config, build
from ftlab.config.check import compose_config
from ftlab.distributed.base import Parallelism, Workers
from ftlab.distributed.env import WorkerEnv, pick_device
from ftlab.distributed.launch import leave, start_workers
from ftlab.distributed.meeting import meet, meet_team
from ftlab.distributed.started import group_of_this_process
from ftlab.errors import ConfigError, FtlabError
from ftlab.loggers.recorder import Recorder
from ftlab.outputs.folder import RunFolder
from ftlab.training.loop import remaining_steps, train_step

REFERENCE = "single"

# Relative. float32 sums in another order differ by about 1e-7 each; 16-bit arithmetic rounds at 1/256 (bfloat16).
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}


@dataclass(frozen=True)
class Deviation:
    """How far one way of spreading the work is from a single process, at most over all steps; relative.

    Attributes:
        loss: |loss − reference| / reference.
        grad_norm: the same of the global gradient norm.
        gradient: ‖g − reference‖ / ‖reference‖ of each parameter's gradient in the first step; the largest.
        parameter: whose gradient that is.
    """

    name: str
    loss: float
    grad_norm: float
    gradient: float
    parameter: str

    def within(self, tolerance: float) -> bool:
        """Whether all three are; a NaN is not."""
        return all(value <= tolerance for value in (self.loss, self.grad_norm, self.gradient))


def verify_parallel(
    overrides: Sequence[str], n_steps: int, extra_dir: Path | None = None
) -> tuple[list[Deviation], float]:
    """Train ``n_steps`` steps of one configuration under every strategy this machine can run, and compare.

    All see the same rows in the same optimizer steps. The ranks are ``parallelism.nproc_per_node``, else one per
    GPU, or two on a CPU. Host memory: twice the model in float32 on the first rank.

    Args:
        extra_dir: a further folder to search for options.

    Returns:
        The deviations from a single process, and the tolerance for this precision.

    Raises:
        ConfigError: for a batch that cannot be divided over the ranks.
        FtlabError: when a worker failed; it has said why.
    """
    kept, asked = _split(overrides)
    given = compose_config([*kept, "parallelism=fsdp", *asked], extra_dir=extra_dir)
    on_gpu = pick_device(given["device"]).type == "cuda"
    n_ranks = given["parallelism"]["nproc_per_node"] or (torch.cuda.device_count() if on_gpu else 2)
    trials = dict(_trials(kept, asked, given, n_ranks, extra_dir))
    settings: Workers = build(given["parallelism"])
    with tempfile.TemporaryDirectory(prefix="ftlab-") as folder:
        if start_workers(settings, n_ranks, Path(folder), _work, trials, n_steps, Path(folder)):
            raise FtlabError("verify-parallel: a worker failed, nothing could be compared")
        results = json.loads((Path(folder) / "deviations.json").read_text())
    return [Deviation(**result) for result in results], TOLERANCE[given["precision"]["compute_dtype"]]


def _split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides without the choice of a strategy, and those of them that set up workers."""
    kept = [o for o in overrides if not o.startswith(("parallelism=", "parallelism."))]
    return kept, [o for o in overrides if o.startswith(("parallelism.nproc_per_node=", "parallelism.timeout_s="))]


def _trials(
    kept: list[str], asked: list[str], given: Config, n_ranks: int, extra_dir: Path | None
) -> Iterator[tuple[str, Config]]:
    """Name and configuration of every way to compute the same steps; the reference first."""
    trainer = given["trainer"]
    batch_size, rows = trainer["batch_size"], trainer["global_batch_size"]
    if batch_size == "auto":
        raise ConfigError("trainer.batch_size", "auto, but what is compared needs one size", "trainer.batch_size=4")
    if rows is None:
        rows = batch_size * trainer["gradient_accumulation_steps"] * n_ranks
    if rows % (batch_size * n_ranks):
        raise ConfigError(
            "trainer.global_batch_size",
            f"{rows} is not a multiple of trainer.batch_size × data-parallel ranks = {batch_size} × {n_ranks}",
            fix=f"trainer.global_batch_size={max(1, round(rows / batch_size / n_ranks)) * batch_size * n_ranks}",
        )
    # In the backward gradients would be gone before they are compared; what they are does not depend on it.
    same_rows = {"global_batch_size": rows, "gradient_accumulation_steps": None, "optimizer_in_backward": False}

    def trial(*choice: str, batch_size: int = batch_size) -> Config:
        config = compose_config([*kept, *choice], extra_dir=extra_dir)
        return config | {"trainer": config["trainer"] | same_rows | {"batch_size": batch_size}}

    yield REFERENCE, trial("parallelism=single")
    for how in ("full", "selective"):
        yield (
            f"single + {how} recomputation",
            trial("parallelism=single", f"parallelism.activation_checkpointing={how}"),
        )
    yield "ddp", trial("parallelism=ddp", *asked)
    yield "fsdp", trial("parallelism=fsdp", *asked)
    for how in ("full", "selective"):
        recomputation = f"parallelism.activation_checkpointing={how}"
        yield f"fsdp + {how} recomputation", trial("parallelism=fsdp", recomputation, *asked)
    if batch_size % 2 == 0:
        halves = trial("parallelism=fsdp", *asked, batch_size=batch_size // 2)
        yield "fsdp, batch / 2, accumulation × 2", halves
    if n_ranks % 2 == 0:
        yield "hsdp, 2 groups", trial("parallelism=hsdp", "parallelism.replicate_degree=2", *asked)


# ------------------------------------------------------------------------------------------ in each worker


@dataclass
class _Measured:
    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Tensor]  # of the first step, whole, on the CPU


class _Probe:
    """A ``Parallelism`` that keeps the first step's gradients as they are before clipping."""

    def __init__(self, parallel: Parallelism):
        self._parallel = parallel
        self.gradients: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parallel, name)

    def clip_grad_norm_(self, model: nn.Module, max_norm: float | None) -> Tensor:
        if not self.gradients:
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                gradient = parameter.grad
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                self.gradients[name] = whole.detach().to("cpu", torch.float32, copy=True)
        return self._parallel.clip_grad_norm_(model, max_norm)


def _work(trials: Mapping[str, Config], n_steps: int, folder: Path) -> None:
    """Run all trials, one after another, in the same ranks; rank 0 writes the deviations."""
    group = group_of_this_process()
    assert group is not None
    settings = next(config for config in trials.values() if "timeout_s" in config["parallelism"])
    worker = meet(WorkerEnv.here(settings["device"]), group, leads=True)
    timeout_s = settings["parallelism"]["timeout_s"]
    deviations: list[Deviation] = []
    with meet_team(worker, folder, timeout_s, lambda error: print(error)) as team:
        recorder = Recorder(RunFolder(folder, writes=False), [])
        reference: _Measured | None = None
        for i, (name, config) in enumerate(trials.items()):
            assert worker.store is not None
            env = replace(worker, store=dist.PrefixStore(f"trial/{i}", worker.store))
            if config["parallelism"]["_target_"].endswith("Single"):
                # Every rank by itself, all the rows: nobody waits in a collective for the one that computes.
                env = replace(env, rank=0, world_size=1)
            try:
                run = assemble(config, recorder, env, team).run
                measured = _measure(run, n_steps)
            except Exception as error:
                cause = team.watch.explain(error)
                if team.watch.takes_the_word():
                    print(f"{name}: {cause}", flush=True)
                leave(1)
            if reference is None:
                reference = measured
            elif worker.rank == 0:
                deviations.append(_deviation(name, measured, reference))
    if worker.rank == 0:
        (folder / "deviations.json").write_text(json.dumps([asdict(deviation) for deviation in deviations]))


def _measure(run: Any, n_steps: int) -> _Measured:
    run.parallel = probe = _Probe(run.parallel)
    measured = _Measured([], [], probe.gradients)
    for micro_batches in islice(remaining_steps(run), n_steps):
        metrics = train_step(run, micro_batches)
        run.state.progress.step += 1
        run.state.progress.epoch_step += 1
        measured.losses.append(metrics.loss.item())
        measured.grad_norms.append(metrics.grad_norm.item())
    probe.close()
    return measured


def _deviation(name: str, ours: _Measured, reference: _Measured) -> Deviation:
    gradients = {
        parameter: ((ours.gradients[parameter] - gradient).norm() / gradient.norm().clamp_min(1e-30)).item()
        for parameter, gradient in reference.gradients.items()
    }
    worst = max(gradients, key=lambda parameter: gradients[parameter])
    return Deviation(
        name=name,
        loss=_largest(ours.losses, reference.losses),
        grad_norm=_largest(ours.grad_norms, reference.grad_norms),
        gradient=gradients[worst],
        parameter=worst,
    )


def _largest(ours: Sequence[float], reference: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True))


def print_deviations(deviations: Sequence[Deviation], tolerance: float, n_steps: int) -> None:
    """For people."""
    table = Table(title=f"largest relative deviation from a single process over {n_steps} steps")
    for column in ("parallelism", "loss", "norm", "gradient", "of parameter", f"within {tolerance:g}"):
        table.add_column(column, no_wrap=True)
    for one in deviations:
        numbers = (f"{value:.1e}" for value in (one.loss, one.grad_norm, one.gradient))
        verdict = "yes" if one.within(tolerance) else "[bold red]NO"
        table.add_row(one.name, *numbers, one.parameter.removesuffix(".weight"), verdict)
    Console(width=max(Console().width, 120)).print(table)
