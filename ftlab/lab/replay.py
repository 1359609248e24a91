"""One optimizer step's batch, built again from a run's folder and compared with what the run noted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ftlab.assembly.data import beside_checkpoint, read_data
from ftlab.config.build import build
from ftlab.config.resume import todays_config
from ftlab.data.batch import Sample
from ftlab.data.loader import BatchLoader
from ftlab.data.tokenizers import Tokenizer
from ftlab.errors import ConfigError
from ftlab.lab.terminal import print_sample
from ftlab.models.hub import resolve_checkpoint
from ftlab.outputs.files import read_yaml
from ftlab.outputs.folder import read_record
from ftlab.training.ledger import seen_at
from ftlab.training.trainer_config import TrainerConfig


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A step's global batch.

    Attributes:
        epoch: which the step was in.
        samples: as the run's order deals them.
        noted: by rank, the samples that the run noted for the step; empty where it noted none.
        tokenizer: to show them.
        same_data: whether the data is still what the run was trained on, by its fingerprint.
    """

    step: int
    epoch: int
    samples: list[Sample]
    noted: dict[int, list[int]]
    tokenizer: Tokenizer
    same_data: bool

    @property
    def as_noted(self) -> bool:
        """Whether these are the samples that the run's ranks noted."""
        return sorted(i for ids in self.noted.values() for i in ids) == sorted(s.sample_id for s in self.samples)


def replay(run: Path, step: int) -> Replayed:
    """Build the global batch of optimizer step ``step`` (from 1) of the run in ``run`` once more.

    Raises:
        ConfigError: ``run`` is no run's folder, or never did that step.
    """
    try:
        config = todays_config(read_yaml(run / "config.yaml"), run, run, to_build=("tokenizer", "dataset", "trainer"))
        record = read_record(run)
        global_batch_size, done = record["global_batch_size"], record["progress"]["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("RUN", f"{run} is not a run that has trained: {error}", "outputs/latest") from error
    if not 1 <= step <= done:
        raise ConfigError(
            "--step", f"{step} is not in 1..{done}, the steps of this run", f"--step {min(max(step, 1), done)}"
        )
    named = config["model"].get("checkpoint")
    follows = named and config["tokenizer"].get("path") == named
    tokenizer: Tokenizer = build(
        beside_checkpoint(config["tokenizer"], named, resolve_checkpoint(named, weights=False) if follows else None)
    )
    data = read_data(config, tokenizer)
    loader = data.loader(batch_size=global_batch_size, gradient_accumulation_steps=1, dp_rank=0, dp_size=1)
    epoch, epoch_step = _place(step - 1, loader, build(config["trainer"]))
    return Replayed(
        step=step,
        epoch=epoch,
        samples=loader.samples(epoch, epoch_step),
        noted=seen_at(run / "ledger", step),
        tokenizer=tokenizer,
        same_data=data.fingerprint == record.get("data_fingerprint"),
    )


def _place(steps_before: int, loader: BatchLoader, trainer: TrainerConfig) -> tuple[int, int]:
    """The epoch of the step that ``steps_before`` come before, and how many of them are in it."""
    steps = trainer.epoch_steps(loader.steps_per_epoch)
    if steps is None:  # a stream, whose end nobody has seen
        if loader.samples(0, steps_before):
            return 0, steps_before
        steps = trainer.epoch_steps(loader.steps_per_epoch)
        assert steps is not None  # now it was
    return divmod(steps_before, steps)


def print_replayed(batch: Replayed, n_shown: int) -> None:
    """For people, the first ``n_shown`` samples whole."""
    console = Console(highlight=False)
    n_tokens = sum(len(sample.tokens) for sample in batch.samples)
    console.print(f"step {batch.step}, epoch {batch.epoch}: {len(batch.samples)} samples, {n_tokens} tokens")
    for rank, ids in sorted(batch.noted.items()):
        console.print(f"  rank {rank} saw {', '.join(map(str, ids)) or 'none'}", soft_wrap=True)
    for sample in batch.samples[:n_shown]:
        print_sample(console, sample, batch.tokenizer)
    if not batch.same_data:
        console.print("\n[bold red]the data is no longer what the run was trained on: its fingerprint differs")
    verdict = "exactly the samples that the run noted" if batch.as_noted else "[bold red]NOT what the run noted"
    console.print(f"\n{verdict}")
