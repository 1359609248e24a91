"""From a configuration to the parts of a run: everything that the loop needs, built and in place."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ftlab.config.build import build
from ftlab.data.base import TrainingData
from ftlab.data.cache import cache_folder
from ftlab.data.loader import BatchLoader
from ftlab.data.stream import Stream
from ftlab.data.tokenizers import Tokenizer
from ftlab.distributed.activation import require_a_gpu
from ftlab.distributed.base import Parallelism, Strategy
from ftlab.distributed.env import WorkerEnv, describe_device, keep_freed_memory, peak_flops
from ftlab.distributed.launch import (
    Team,
)
from ftlab.distributed.precision import Precision
from ftlab.errors import ConfigError, DataError
from ftlab.forecast import MemoryMeter, Setting, available_bytes, forecast_or_none, refuse_unfit, with_batch_size
from ftlab.loggers.base import RunInfo
from ftlab.loggers.recorder import Recorder
from ftlab.models.attention import kernel_name
from ftlab.models.auto import AnyModel, AnyModelConfig, find_model
from ftlab.models.compiled import compile_blocks
from ftlab.models.config import ModelConfig
from ftlab.models.hub import commit_of
from ftlab.models.resize import compare_specials, fit_vocabulary
from ftlab.models.transformer import Transformer
from ftlab.models.weights import load_weights
from ftlab.optim.groups import decay_groups
from ftlab.outputs.files import shortest
from ftlab.outputs.folder import RunFolder
from ftlab.outputs.secrets import mask_secrets
from ftlab.storage.checkpoints import Checkpoints, less_is_better
from ftlab.training import rng
from ftlab.training.checkpoint import CheckpointConfig, Checkpointer, Identity
from ftlab.training.evaluate import Evaluator
from ftlab.training.guard import StepGuard
from ftlab.training.loop import Run, TrainerConfig
from ftlab.training.metrics import GIB, training_flops
from ftlab.training.opened import Opened
from ftlab.training.rehearse import Rehearsal
from ftlab.training.snapshot import restore_optimizer, restore_weights
from ftlab.training.space import require_space
from ftlab.training.state import TrainState

Config = dict[str, Any]
Fill = Callable[[AnyModel], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All parts of one run, assembled."""

    config: Config
    tokenizer: Tokenizer
    model_config: AnyModelConfig
    data: TrainingData
    commit: str | None  # of the repository on the Hub that the weights came from
    run: Run
    predicted: Rehearsal | None
    meter: MemoryMeter

    def memory(self) -> dict[str, float | None]:
        """For run.json: GiB of this rank, predicted before the run and measured in it."""
        predicted = None if self.predicted is None else self.predicted.peak / GIB
        return {"predicted_peak_gib": predicted, "measured_peak_gib": self.meter.peak_gib()}

    def attention(self) -> str | None:
        """For run.json: the kernel that computes it; None for transformers' models, which choose their own."""
        run = self.run
        if not isinstance(self.model_config, ModelConfig):
            return None
        seq_len, device = self.config["seq_len"], run.parallel.device
        return kernel_name(self.model_config, seq_len, run.precision.compute, device, packed=is_packed(self.config))

    def checkpointer(self, folder: RunFolder, keep: CheckpointConfig, opened: Opened | None) -> Checkpointer:
        """What saves this run."""
        run, masked = self.run, mask_secrets(self.config)
        told = {key: value for key, value in masked.items() if key not in ("resume", "paths")}
        metric = self.config["evaluation"]["metric"]
        checkpointer = Checkpointer(
            keep,
            Checkpoints(folder.path / "checkpoints"),
            run.state,
            run.parallel,
            Identity(
                run=folder.run_id or folder.recorded_id() or "",
                config=masked,
                config_hash=hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest(),
                data=self.data.fingerprint,
                tokenizer=self.tokenizer.fingerprint,
                global_batch_size=run.loader.global_batch_size,
            ),
            metric=(metric, less_is_better(metric)),
            parent=opened.manifest.digest if opened and run.state.progress.step else None,
            place=run.loader.place,
        )
        run.wishes.save_is_due = checkpointer.save_is_due_by_clock
        return checkpointer

    def info(self, folder: RunFolder, logged_until: int) -> RunInfo:
        """What loggers are told at the start."""
        config, run = mask_secrets(self.config), self.run
        return RunInfo(
            folder=folder.path,
            run_id=folder.run_id,
            first_step=run.state.progress.step,
            logged_until=logged_until,
            name=config["run_name"],
            config=config,
            seed=config["seed"],
            total_steps=run.total_steps,
            global_batch_size=run.loader.global_batch_size,
            model=f"{self.model_config.n_layers} blocks of {self.model_config.dim}",
            n_params=self.model_config.n_params(),
            weights=mask_secrets(self.model_config.checkpoint),
            dataset=config["dataset"]["source"],
            n_train_samples=None if isinstance(self.data.train, Stream) else len(self.data.train),
            n_val_samples=len(self.data.validation) if self.data.validation else 0,
            device=describe_device(run.parallel.device)
            + (f" × {run.parallel.dp_size}" if run.parallel.dp_size > 1 else ""),
            precision=f"{run.precision.param_dtype} weights, {run.precision.compute_dtype} arithmetic",
            next_commands=(
                f'ftlab generate {shortest(folder.path)} "..."'
                if config["checkpoint"]["export"]
                else f"ftlab export {shortest(folder.path)} OUT",
            ),
        )


def assemble(
    config: Config,
    recorder: Recorder,
    worker: WorkerEnv,
    team: Team | None,
    opened: Opened | None = None,
    *,
    goes_on: bool = False,
) -> Experiment:
    """Build every part of a run: what can fail cheaply first, then data, then weights.

    Args:
        opened: a checkpoint to begin with, instead of the model's own weights.
        goes_on: all of it is restored; else its weights, and with ``init_optimizer`` the optimizer's state.
    """
    build(config["precision"]).require(worker.device)
    require_a_gpu(config["parallelism"]["activation_checkpointing"], worker.device)
    model_config, pretrained = find_model(build(config["model"]), fetch=opened is None)
    if config["seq_len"] > model_config.max_seq_len:
        problem = f"{config['seq_len']} is more than the {model_config.max_seq_len} tokens that the model reads"
        raise ConfigError("seq_len", problem, f"seq_len={model_config.max_seq_len}")
    commit = commit_of(pretrained) if pretrained else None
    if opened is None:
        recorder.folder.update(weights={"checkpoint": model_config.checkpoint, "commit": commit})
    tokenizer: Tokenizer = build(beside_checkpoint(config["tokenizer"], config["model"]["checkpoint"], pretrained))
    model_config = with_vocabulary(model_config, pretrained, tokenizer, opened)
    if worker.rank == 0 and recorder.folder.writes:
        require_space(
            build(config["checkpoint"]),
            Checkpoints(recorder.folder.path / "checkpoints"),
            model_config.n_params(),
            build(config["precision"]).weights,
            build(config["optimizer"]),
        )
    if team is not None:
        team.watch.beat(0, "read data")
    data = read_data(config, tokenizer, progress=recorder.progress)
    if team is not None and (fingerprint := team.from_first("data", data.fingerprint)) != data.fingerprint:
        raise DataError(f"dataset: this machine's samples ({data.fingerprint}) are not rank 0's ({fingerprint})")
    if opened is not None and goes_on:
        _same_inputs(opened, data, tokenizer)
    evaluator = None
    if data.validation is not None:
        evaluator = Evaluator(
            config=build(config["evaluation"]),
            validation=data.validation,
            tokenizer=tokenizer,
            loss=replace(build(config["loss"]), label_smoothing=0.0, z_loss=0.0),
            on_samples=recorder.log_samples,
        )
    if opened is None:
        seed = config["seed"]
        fill = random_weights(seed) if pretrained is None else weights_in(pretrained, tokenizer.new_ids)
    else:  # what goes on is restored at once, when there is an optimizer too
        fill = (lambda _: None) if goes_on else weights_of(opened)
    if team is not None:
        team.watch.beat(0, "build model")
    config = _with_batch_size(config, model_config, data, worker, team)
    predicted, meter = _forecast(config, model_config, data, worker), MemoryMeter(worker.device)
    run = assemble_run(
        config,
        model_config,
        fill,
        data.loader,
        evaluator,
        recorder.log,
        worker,
        global_batch_size=opened.told["cursor"]["global_batch_size"] if opened is not None and goes_on else None,
    )
    if team is not None:
        team.watch.beat(0, "restore")
    if opened is not None and goes_on:
        opened.restore(run.state, run.parallel)
        run.loader.go_to(opened.told["cursor"])
    elif opened is not None and config["init_optimizer"]:
        restore_optimizer(run.state, opened.stored, opened.told)
    return Experiment(
        config=config,
        tokenizer=tokenizer,
        model_config=model_config,
        commit=commit,
        data=data,
        run=run,
        predicted=predicted,
        meter=meter,
    )


def read_data(config: Config, tokenizer: Tokenizer, **given: Any) -> TrainingData:
    """The rows of ``config``, tokenised; from the cache where they are in it.

    Args:
        given: ``progress`` and what else a dataset takes at run time.
    """
    found: TrainingData = build(
        config["dataset"],
        tokenizer=tokenizer,
        seq_len=config["seq_len"],
        seed=config["seed"] or 0,
        cache_dir=cache_folder(config["paths"]["cache_dir"]),
        **{"progress": None} | given,
    )
    return found


def _setting(data: TrainingData, worker: WorkerEnv) -> Setting:
    longest, longest_validation = data.longest()
    return Setting(
        longest=longest,
        longest_validation=longest_validation,
        n_ranks=worker.world_size,
        n_local_ranks=worker.local_world_size,
        on_cuda=worker.device.type == "cuda",
    )


def _with_batch_size(
    config: Config, model: AnyModelConfig, data: TrainingData, worker: WorkerEnv, team: Team | None
) -> Config:
    """``config`` with a number for ``trainer.batch_size=auto``, the first rank's."""
    if config["trainer"]["batch_size"] != "auto":
        return config
    available = available_bytes(worker.device, worker.local_world_size)
    known = model if isinstance(model, ModelConfig) else None
    found = with_batch_size(config, known, _setting(data, worker), available)
    size: int = found["trainer"]["batch_size"]
    if team is not None:
        size = int(team.from_first("batch_size", str(size)))
    log.info("trainer.batch_size=%d: the largest that fits", size)
    return found | {"trainer": found["trainer"] | {"batch_size": size}}


def _forecast(config: Config, model: AnyModelConfig, data: TrainingData, worker: WorkerEnv) -> Rehearsal | None:
    """What the run will take of memory; refused where that is clearly not there."""
    if not isinstance(model, ModelConfig):  # what transformers' models do with memory is not rehearsed
        return None
    setting = _setting(data, worker)
    predicted = forecast_or_none(config, model, setting)
    if predicted is not None:
        available = available_bytes(worker.device, worker.local_world_size)
        refuse_unfit(predicted, available, config, model, setting, describe_device(worker.device))
    return predicted


def assemble_run(
    config: Config,
    model_config: AnyModelConfig,
    fill: Fill,
    deal: Callable[..., BatchLoader],
    evaluator: Evaluator | None,
    log: Callable[[Mapping[str, float], int], None],
    worker: WorkerEnv,
    global_batch_size: int | None = None,
) -> Run:
    """What the loop needs to train ``model_config`` as ``config`` says.

    Args:
        fill: gives the parameters their values.
        deal: makes the loader of one rank (``TrainingData.loader``).
        global_batch_size: of a run that goes on, which fixes the order of its rows; null: the configuration's.
    """
    rng.seed(config["seed"])
    trainer: TrainerConfig = build(config["trainer"])
    precision: Precision = build(config["precision"])
    if worker.device.type == "cpu":
        keep_freed_memory()
    strategy: Strategy = build(config["parallelism"])
    parallel = strategy.start(worker, precision)
    if global_batch_size is not None:
        trainer = trainer.with_global_batch_size(global_batch_size, parallel.dp_size)
    trainer.require_one_micro_batch(parallel.dp_size)
    loader = deal(
        batch_size=trainer.batch_size,
        gradient_accumulation_steps=trainer.accumulation_steps(parallel.dp_size),
        dp_rank=parallel.dp_rank,
        dp_size=parallel.dp_size,
    )
    model = build_model(model_config, fill, precision, parallel)
    if config["compile"]:
        compile_blocks(model, varying=not is_packed(config))
    optimizer: torch.optim.Optimizer = build(config["optimizer"])(decay_groups(model))
    schedule = build(config["scheduler"], total_steps=trainer.total_steps(loader.steps_per_epoch))
    scaler = precision.grad_scaler(parallel.device)
    state = TrainState(
        model=model,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
        scaler=scaler,
        guard=StepGuard(
            optimizer, scaler, parallel, max_skipped=trainer.max_skipped_steps, spike_sigma=trainer.spike_sigma
        ),
    )
    return Run(
        trainer=trainer,
        state=state,
        loader=loader,
        loss=build(config["loss"]),
        precision=precision,
        parallel=parallel,
        evaluator=evaluator,
        log=log,
        step_flops=flops_counter(model_config),
        peak_flops=peak_flops(parallel.device, precision.compute),
    )


def beside_checkpoint(tokenizer: Config, named: str | None, folder: Path | None) -> Config:
    """The tokenizer's node; where its path is the model's, it reads the folder that this was resolved to."""
    follows = folder is not None and tokenizer.get("path") == named
    return tokenizer | {"path": str(folder)} if follows else tokenizer


def with_vocabulary(
    model: AnyModelConfig, folder: Path | None, tokenizer: Tokenizer, opened: Opened | None = None
) -> AnyModelConfig:
    """``model`` with rows for all of the tokenizer's ids; pretrained weights must be of that tokenizer.

    Args:
        folder: of pretrained weights.
        opened: a checkpoint instead, which has the rows that it has.
    """
    if opened is not None and (n_rows := opened.vocab_size) is not None:
        if n_rows < tokenizer.vocab_size:
            problem = f"it has {tokenizer.vocab_size} tokens, but {opened.path} has rows for {n_rows}"
            raise ConfigError("tokenizer", problem, "the tokenizer that the checkpoint was trained with")
        return replace(model, vocab_size=n_rows)
    fitting = fit_vocabulary(model, folder, tokenizer.vocab_size, tokenizer.new_ids)
    if folder is not None:
        for warning in compare_specials(folder, tokenizer.bos_id, tokenizer.eos_id):
            log.warning("tokenizer: %s", warning)
        if new_ids := tokenizer.new_ids:
            new = f"{len(new_ids)} new tokens, ids {new_ids.start} to {new_ids.stop - 1}"
            log.info("vocabulary: %s: their rows begin as the mean of the others", new)
    return fitting


def _same_inputs(opened: Opened, data: TrainingData, tokenizer: Tokenizer) -> None:
    """Refuse to go on with other rows or another tokenizer than the run was trained with."""
    now = {"dataset": data.fingerprint, "tokenizer": tokenizer.fingerprint}
    then = {"dataset": opened.told["data"], "tokenizer": opened.told["tokenizer"]}
    for key in ("tokenizer", "dataset"):
        if now[key] != then[key]:
            raise ConfigError(
                key,
                f"the run was trained with other {'rows' if key == 'dataset' else 'tokens'} (fingerprint "
                f"{then[key][:12]}…, here {now[key][:12]}…)",
                f"the same files as then, or a new run from its weights: init_from={opened.path.parent.parent}",
            )


def random_weights(seed: int) -> Fill:
    """Draws them."""

    def draw(model: AnyModel) -> None:
        assert isinstance(model, Transformer)  # others are nothing without a checkpoint
        model.init_weights(seed)

    return draw


def weights_in(folder: Path, new_ids: range = range(0)) -> Fill:
    """Loads pretrained ones, with rows for ``new_ids`` that the vocabulary did not have."""
    return lambda model: load_weights(model, folder, new_ids)


def weights_of(opened: Opened) -> Fill:
    """Loads those of a checkpoint of ours."""
    return lambda model: restore_weights(model, opened.stored, opened.told, opened.path)


def build_model(config: AnyModelConfig, fill: Fill, precision: Precision, parallel: Parallelism) -> AnyModel:
    """The model on its device with its weights in place: built on meta, so that nothing is ever held twice.

    Args:
        fill: gives the freshly allocated parameters their values.
    """
    with torch.device("meta"):
        model = config.build().to(precision.weights)
    precision.prepare(model)
    parallel.place(model)
    fill(model)
    return model


def is_packed(config: Config) -> bool:
    """Whether training rows are packs of several samples, all of one length; of a mixture, those of any of its sets."""
    sets = config["dataset"].get("sets", {"all": config["dataset"]})
    return any(one.get("packing", "none") != "none" for one in sets.values())


def flops_counter(model: AnyModelConfig) -> Callable[[list[int]], float]:
    """FLOPs of one forward and backward, as a function of the real lengths of the sequences."""
    assert model.head_dim is not None  # ModelConfig resolved it
    return partial(
        training_flops,
        model.n_matmul_params(),
        model.n_layers,
        model.n_heads * model.head_dim,
    )
