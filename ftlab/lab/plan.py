"""What a configuration will be: parameters, arithmetic, memory, steps, time and cost, before any of it is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ftlab.assembly.data import read_data
from ftlab.config.build import Config, build
from ftlab.config.check import compose_config
from ftlab.data.base import TrainingData
from ftlab.data.stream import Stream
from ftlab.data.tokenizers import Tokenizer
from ftlab.distributed.env import describe_device, pick_device
from ftlab.errors import ConfigError
from ftlab.forecast import Setting, available_bytes, forecast, n_workers, with_batch_size
from ftlab.models.config import ModelConfig
from ftlab.models.layouts import described_sizes
from ftlab.models.resize import fit_vocabulary
from ftlab.remedies import smallest_change
from ftlab.training.metrics import GIB, training_flops
from ftlab.training.trainer_config import TrainerConfig


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the user says instead of files that are not at hand.

    Attributes:
        rows: training rows.
        row_tokens: their mean length.
        tokens_per_s: of the whole run, all ranks together.
        price_per_hour: of one device, in any currency.
        memory_gib: of one device; None: this machine's.
    """

    rows: int | None = None
    row_tokens: float | None = None
    tokens_per_s: float | None = None
    price_per_hour: float | None = None
    memory_gib: float | None = None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the run will count, over all ranks; None where nothing is known of the rows.

    Attributes:
        rows, validation_rows: of the data, each counted once.
        source: ``data``: counted on the rows themselves; ``given``: from the numbers of the command line.
        longest: tokens of the longest row.
    """

    source: str
    rows: int | None
    validation_rows: int | None
    steps: int | None
    samples: int | None
    tokens: int | None
    target_tokens: int | None
    longest: int
    longest_validation: int | None


def plan(overrides: Sequence[str], given: Given, extra_dir: Path | None = None) -> dict[str, Any]:
    """Everything that is known beforehand of the run that ``overrides`` describe. Nothing is downloaded.

    Args:
        extra_dir: a further folder to search for options.

    Raises:
        ConfigError, ConfigErrors: for a configuration that no run could use.
    """
    config = compose_config(overrides, extra_dir=extra_dir)
    config["seed"] = config["seed"] or 0
    device = pick_device(config["device"])
    n_ranks, n_local = n_workers(config, device)
    tokenizer = _tokenizer(config)
    model = _model(config, tokenizer)
    auto = config["trainer"]["batch_size"] == "auto"
    # How many steps and rows there are does not depend on the size that is found.
    counted = config | {"trainer": config["trainer"] | {"batch_size": 1}} if auto else config
    counts = _counts(counted, tokenizer, n_ranks, given)
    on_cuda = device.type == "cuda" or given.memory_gib is not None
    setting = Setting(
        longest=counts.longest,
        longest_validation=counts.longest_validation,
        rows=counts.rows,
        validation_rows=counts.validation_rows,
        n_ranks=n_ranks,
        n_local_ranks=n_local,
        on_cuda=on_cuda,
    )
    available = int(given.memory_gib * GIB) if given.memory_gib is not None else available_bytes(device, n_local)
    config = with_batch_size(config, model, setting, available)
    rehearsal = forecast(config, model, setting)
    fits = rehearsal.peak <= available
    change = None if fits else smallest_change(rehearsal, config, model, setting, available)
    accumulation = build(config["trainer"]).accumulation_steps(n_ranks)
    return {
        "model": {
            "checkpoint": model.checkpoint,
            "parameters": model.n_params(),
            "vocab_size": model.vocab_size,
            "flops_per_token": _flops_per_token(model, counts.longest),
        },
        "batch": {
            "ranks": n_ranks,
            "batch_size": config["trainer"]["batch_size"],
            "gradient_accumulation_steps": accumulation,
            "global_batch_size": config["trainer"]["batch_size"] * accumulation * n_ranks,
        },
        "run": asdict(counts),
        "memory": {
            "phases_gib": {name: n_bytes / GIB for name, n_bytes in rehearsal.phases.items()},
            "weights_gib": rehearsal.weights / GIB,
            "gradients_gib": rehearsal.gradients / GIB,
            "optimizer_state_gib": rehearsal.optimizer_state / GIB,
            "peak_gib": rehearsal.peak / GIB,
            "available_gib": available / GIB,
            "device": "given" if given.memory_gib is not None else describe_device(device),
            "fits": fits,
            "smallest_change": change.overrides if change else None,
        },
        "cost": _cost(counts, n_ranks, given),
    }


def _tokenizer(config: Config) -> Tokenizer | None:
    """The run's tokenizer where its files are on this machine."""
    node = config["tokenizer"]
    path = node.get("path")
    if path is None and "path" in node:
        return None
    at_hand = path is None or path == "tiny" or Path(path).expanduser().exists()
    return build(node) if at_hand else None


def _model(config: Config, tokenizer: Tokenizer | None) -> ModelConfig:
    model: ModelConfig = build(config["model"])
    folder = Path(model.checkpoint).expanduser() if model.checkpoint else None
    if tokenizer is not None and (folder is None or folder.is_dir()):
        return fit_vocabulary(model, folder, tokenizer.vocab_size, tokenizer.new_ids)
    if model.vocab_size is None and folder is not None and folder.is_dir():
        return replace(model, vocab_size=described_sizes(folder)[1].get("vocab_size"))
    if model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size", "is null, and no tokenizer at hand tells", "model.vocab_size=32000 or tokenizer.path=…"
        )
    return model


def _counts(config: Config, tokenizer: Tokenizer | None, n_ranks: int, given: Given) -> Counts:
    trainer: TrainerConfig = build(config["trainer"])
    dataset = config["dataset"]
    at_hand = dataset.get("source") == "tiny" or dataset.get("data_files") is not None
    at_hand = at_hand and not dataset.get("streaming")  # to count a stream is to read all of it
    if at_hand and tokenizer is not None and given.rows is None:
        data = read_data(config, tokenizer)
        return _counted(trainer, data, n_ranks)
    seq_len, rows = config["seq_len"], given.rows
    per_step = trainer.batch_size * trainer.accumulation_steps(n_ranks) * n_ranks
    steps = trainer.max_steps
    if rows is not None:
        steps = trainer.total_steps(-(-rows // per_step))
    samples = None
    if rows is not None and steps is not None:
        per_epoch = trainer.epoch_steps(-(-rows // per_step)) or steps
        whole, rest = divmod(steps, per_epoch)
        samples = whole * min(per_epoch * per_step, rows) + min(rest * per_step, rows)
    tokens = round(samples * given.row_tokens) if samples is not None and given.row_tokens is not None else None
    return Counts(
        source="given",
        rows=rows,
        validation_rows=None,
        steps=steps,
        samples=samples,
        tokens=tokens,
        target_tokens=None,
        longest=seq_len,
        longest_validation=seq_len,
    )


def _counted(trainer: TrainerConfig, data: TrainingData, n_ranks: int) -> Counts:
    """By the loader itself, on every rank: what it deals out is what the run counts."""
    loaders = [
        data.loader(
            batch_size=trainer.batch_size,
            gradient_accumulation_steps=trainer.accumulation_steps(n_ranks),
            dp_rank=rank,
            dp_size=n_ranks,
        )
        for rank in range(n_ranks)
    ]
    steps_per_epoch = loaders[0].steps_per_epoch
    total, per_epoch = trainer.total_steps(steps_per_epoch), trainer.epoch_steps(steps_per_epoch)
    assert not isinstance(data.train, Stream)
    assert per_epoch is not None
    samples = tokens = targets = longest = 0
    for epoch in range(-(-total // per_epoch)):
        n_steps = min(per_epoch, total - epoch * per_epoch)
        for loader in loaders:
            for batch in (batch for step in islice(loader.steps(epoch), n_steps) for batch in step):
                samples += len(batch.sample_ids)
                tokens += batch.n_tokens
                targets += batch.n_targets
                longest = max(longest, batch.tokens.shape[1])
    return Counts(
        source="data",
        rows=len(data.train),
        validation_rows=len(data.validation) if data.validation else None,
        steps=total,
        samples=samples,
        tokens=tokens,
        target_tokens=targets,
        longest=longest,
        longest_validation=data.longest()[1],
    )


def _flops_per_token(model: ModelConfig, length: int) -> float:
    """Forward and backward, for a token of a row of ``length``; as ``perf/mfu`` counts."""
    assert model.head_dim is not None  # ModelConfig resolved it
    return training_flops(model.n_matmul_params(), model.n_layers, model.n_heads * model.head_dim, [length]) / length


def _cost(counts: Counts, n_ranks: int, given: Given) -> dict[str, float] | None:
    """Hours, device-hours and price of the training steps; evaluation comes on top."""
    if counts.tokens is None or given.tokens_per_s is None:
        return None
    hours = counts.tokens / given.tokens_per_s / 3600
    cost = {"tokens_per_s": given.tokens_per_s, "hours": hours, "device_hours": hours * n_ranks}
    return cost | ({} if given.price_per_hour is None else {"price": cost["device_hours"] * given.price_per_hour})
