"""The composition root: one resolved configuration becomes one run.

Everything else in the package takes plain arguments; this module reads the
configuration, builds the parts, hands them to the loop and keeps the run folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ftlab.config.build import build
from ftlab.config.layers import leaves
from ftlab.data.loader import BatchLoader, SampleSource
from ftlab.data.sft import InstructDataset
from ftlab.data.tokenizers import Tokenizer
from ftlab.distributed.base import Parallelism, Strategy
from ftlab.distributed.env import WorkerEnv, describe_device, keep_freed_memory, peak_flops
from ftlab.distributed.heartbeat import RankError
from ftlab.distributed.launch import (
    Team,
    attempt,
    meet_team,
)
from ftlab.distributed.precision import Precision
from ftlab.errors import ConfigError, ConfigErrors, DataError, FtlabError
from ftlab.forecast import MemoryMeter, Setting, available_bytes, forecast_or_none, refuse_unfit
from ftlab.loggers.base import RunInfo
from ftlab.loggers.recorder import Recorder
from ftlab.models.resize import compare_specials, fit_vocabulary
from ftlab.models.transformer import ModelConfig, Transformer
from ftlab.models.weights import load_weights, resolve_checkpoint
from ftlab.optim.groups import decay_groups
from ftlab.outputs import RunFolder, Status, mask_secrets, setup_logging
from ftlab.training.checkpoint import CheckpointConfig, export_model
from ftlab.training.evaluate import Evaluator
from ftlab.training.loop import Run, TrainerConfig, fit
from ftlab.training.metrics import GIB, training_flops
from ftlab.training.rehearse import Rehearsal
from ftlab.training.state import TrainState

Config = dict[str, Any]
log = logging.getLogger(__name__)


def train_in_team(config: Config, worker: WorkerEnv, scratch: Path | None) -> int:
    def give_up(error: RankError) -> None:
        if _stands_in(worker, team) and (folder := _folder_of_rank_0(config)) is not None:
            _say(error, aloud=team.watch.takes_the_word())
            folder.finish(_verdict(error)[0], error=error)

    with meet_team(worker, scratch, build(config["parallelism"]).timeout_s, give_up) as team:
        try:
            team.wait_for_neighbours()
            return train(config, worker, team)
        except (Exception, KeyboardInterrupt) as error:  # before there was a folder to say it in
            cause = team.watch.explain(error)
            _say(cause, aloud=team.watch.takes_the_word())
            return _verdict(cause)[1]


def train(config: Config, worker: WorkerEnv, team: Team | None = None) -> int:
    """Train in this process; the run folder says how it ended, whatever happens. Returns the exit code.

    Args:
        team: the other ranks of the run, each of which is here too; None where this is the only one.
    """
    first = worker.rank == 0
    folder = RunFolder(config["paths"]["output_dir"], writes=True) if first else None
    if team is not None:
        path = team.from_first("folder", str(folder.path) if folder else None)
        folder = folder or RunFolder(path, writes=False)
    assert folder is not None
    setup_logging(folder.path, worker.rank)
    recorder = Recorder(folder, [build(node) for node in config["logger"].values()] if first else [])
    if first:
        _open(folder, config)
    try:
        if team is not None:
            config = same_everywhere(config, team)
        _train(config, recorder, worker, team)
    except (Exception, KeyboardInterrupt) as error:
        cause = team.watch.explain(error) if team else error
        status, exit_code = _verdict(cause)
        _say(cause, aloud=team is None or team.watch.takes_the_word())
        recorder.finish(status, cause, hurry=isinstance(cause, RankError))
        if team is not None and _stands_in(worker, team) and (lost := _folder_of_rank_0(config)) is not None:
            lost.finish(status, error=cause)
        return exit_code
    recorder.finish("completed", None)
    return 0


def _open(folder: RunFolder, config: Config) -> None:
    if attempt():
        folder.forget_metrics()
        log.warning("starting again: attempt %d", attempt() + 1)
    folder.write_config(config)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    folder.start(gpus=gpus, name=config["run_name"], seed=config["seed"])
    folder.link_latest()


def _verdict(error: BaseException) -> tuple[Status, int]:
    """How a run ended that ``error`` ended, and the exit code."""
    match error:
        case KeyboardInterrupt():
            return "preempted", 130
        case RankError() if error.failure.interrupted:
            return "preempted", error.exit_code
        case FtlabError():
            return "failed", error.exit_code
        case _:
            return "failed", 1


def _say(error: BaseException, *, aloud: bool) -> None:
    """Say what went wrong in the user's terms; only our own bugs show a traceback. Not aloud: to the rank's file."""
    level = logging.ERROR if aloud else logging.INFO
    match error:
        case KeyboardInterrupt():
            log.log(level, "interrupted")
        case FtlabError():
            log.log(level, "%s", error)
        case torch.OutOfMemoryError() | MemoryError():
            log.log(level, "out of memory: %s\n  try: a smaller trainer.batch_size", error)
        case _:
            log.log(level, "this is a bug in ftlab, or the machine failed:", exc_info=error)


def _stands_in(worker: WorkerEnv, team: Team) -> bool:
    """Whether this rank keeps the folder now: the first one left of rank 0's machine."""
    return worker.rank == worker.local_rank and team.watch.is_first()


def _folder_of_rank_0(config: Config) -> RunFolder | None:
    """The run's folder, to finish it in place of a rank 0 that is gone or hangs; None if that one still did."""
    return RunFolder.of_a_lost_process(config["paths"]["output_dir"])


# Where things are on a machine is its own affair; what is computed from them is not.
_OF_THE_MACHINE = (
    "paths.output_dir",
    "model.checkpoint",
    "tokenizer.path",
    "dataset.data_files",
    "parallelism.nproc_per_node",
)


def same_everywhere(config: Config, team: Team) -> Config:
    """Rank 0's configuration, with this machine's own paths.

    Raises:
        ConfigErrors: where this machine was given something else, for all its keys.
    """
    theirs: Config = json.loads(team.from_first("config", json.dumps(config) if team.worker.rank == 0 else None))
    if config["seed"] is None:  # drawn by rank 0's machine
        config = config | {"seed": theirs["seed"]}
    mine, first = dict(leaves(config)), dict(leaves(theirs))
    differing = [key for key in {**first, **mine} if first.get(key) != mine.get(key) and key not in _OF_THE_MACHINE]
    if differing:
        raise ConfigErrors(
            [
                ConfigError(key, f"{mine.get(key)!r} on this machine, but {first.get(key)!r} on the first", "the same")
                for key in differing
            ]
        )
    return config


def _train(config: Config, recorder: Recorder, worker: WorkerEnv, team: Team | None) -> None:
    experiment = assemble(config, recorder, worker, team)
    run, folder = experiment.run, recorder.folder
    progress = run.state.progress
    folder.write_json("data_report.json", experiment.data.report)
    if worker.rank == 0:
        for warning in experiment.data.report["warnings"]:
            log.warning("data: %s", warning)
    folder.update(data_fingerprint=experiment.data.fingerprint, n_params=experiment.model_config.n_params())
    recorder.start(experiment.info(folder.path))
    if team is not None:
        beat = team.watch.beat
        run.clock.on_enter = lambda phase: beat(progress.step + (phase != "eval"), phase)
    try:
        fit(run)
    finally:
        folder.update(progress=asdict(progress), memory=experiment.memory())
        # The last line's speed is one step's; the summary wants the run's.
        recorder.latest |= {"perf/tokens_per_s": progress.tokens / progress.train_s} if progress.train_s else {}
    keep: CheckpointConfig = build(config["checkpoint"])
    if keep.export:
        run.clock.enter("save")
        exported = export_model(
            run.state.model, experiment.tokenizer, folder.path / "export", dtype=run.precision.weights
        )
        recorder.artifacts.append(exported)
    run.parallel.close()


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All parts of one run, assembled."""

    config: Config
    tokenizer: Tokenizer
    model_config: ModelConfig
    data: InstructDataset
    run: Run
    predicted: Rehearsal | None
    meter: MemoryMeter

    def memory(self) -> dict[str, float | None]:
        """For run.json: GiB of this rank, predicted before the run and measured in it."""
        predicted = None if self.predicted is None else self.predicted.peak / GIB
        return {"predicted_peak_gib": predicted, "measured_peak_gib": self.meter.peak_gib()}

    def info(self, folder: Path) -> RunInfo:
        """What loggers are told at the start."""
        config, run = self.config, self.run
        return RunInfo(
            folder=folder,
            name=config["run_name"],
            config=mask_secrets(config),
            seed=config["seed"],
            total_steps=run.total_steps,
            global_batch_size=run.loader.global_batch_size,
            model=f"{self.model_config.n_layers} blocks of {self.model_config.dim}",
            n_params=self.model_config.n_params(),
            weights=self.model_config.checkpoint,
            dataset=config["dataset"]["source"],
            n_train_samples=len(self.data.train),
            n_val_samples=len(self.data.validation) if self.data.validation else 0,
            device=describe_device(run.parallel.device)
            + (f" × {run.parallel.dp_size}" if run.parallel.dp_size > 1 else ""),
            precision=f"{run.precision.param_dtype} weights, {run.precision.compute_dtype} arithmetic",
            next_commands=(f'ftlab generate {folder} "..."',),
        )


def assemble(config: Config, recorder: Recorder, worker: WorkerEnv, team: Team | None) -> Experiment:
    """Build every part of a run: what can fail cheaply first, then data, then weights."""
    model_config: ModelConfig = build(config["model"])
    checkpoint = resolve_checkpoint(model_config.checkpoint) if model_config.checkpoint else None
    tokenizer: Tokenizer = build(beside_checkpoint(config["tokenizer"], config["model"]["checkpoint"], checkpoint))
    model_config = with_vocabulary(model_config, checkpoint, tokenizer)
    data: InstructDataset = build(
        config["dataset"],
        tokenizer=tokenizer,
        seq_len=config["seq_len"],
        seed=config["seed"],
        progress=recorder.progress,
        share=team.share if team else None,
    )
    if team is not None and (fingerprint := team.from_first("data", data.fingerprint)) != data.fingerprint:
        raise DataError(f"dataset: this machine's samples ({data.fingerprint}) are not rank 0's ({fingerprint})")
    evaluator = None
    if data.validation is not None:
        evaluator = Evaluator(
            config=build(config["evaluation"]),
            validation=data.validation,
            tokenizer=tokenizer,
            loss=replace(build(config["loss"]), label_smoothing=0.0, z_loss=0.0),
            on_samples=recorder.log_samples,
        )
    predicted = _forecast(config, model_config, data, worker)
    meter = MemoryMeter(worker.device)
    run = assemble_run(
        config,
        model_config,
        checkpoint,
        data.train,
        data.shuffle,
        tokenizer.pad_id,
        evaluator,
        recorder.log,
        worker,
        tokenizer.new_ids,
    )
    return Experiment(
        config=config,
        tokenizer=tokenizer,
        model_config=model_config,
        data=data,
        run=run,
        predicted=predicted,
        meter=meter,
    )


def _forecast(config: Config, model_config: ModelConfig, data: InstructDataset, worker: WorkerEnv) -> Rehearsal | None:
    """What the run will take of memory; refused where that is clearly not there."""
    longest = {name: part["max_row_tokens"] for name in ("train", "validation") if (part := data.report[name])}
    setting = Setting(
        longest=min(longest["train"], config["seq_len"]),
        longest_validation=min(longest["validation"], config["seq_len"]) if "validation" in longest else None,
        n_ranks=worker.world_size,
        n_local_ranks=worker.local_world_size,
        on_cuda=worker.device.type == "cuda",
    )
    predicted = forecast_or_none(config, model_config, setting)
    if predicted is not None:
        available = available_bytes(worker.device, worker.local_world_size)
        refuse_unfit(predicted, available, config, model_config, setting, describe_device(worker.device))
    return predicted


def assemble_run(
    config: Config,
    model_config: ModelConfig,
    checkpoint: Path | None,
    rows: SampleSource,
    shuffle: bool,
    pad_id: int,
    evaluator: Evaluator | None,
    log: Callable[[Mapping[str, float], int], None],
    worker: WorkerEnv,
    new_ids: range = range(0),
) -> Run:
    """What the loop needs to train ``model_config`` on ``rows`` as ``config`` says; weights are loaded here."""
    torch.manual_seed(config["seed"])
    trainer: TrainerConfig = build(config["trainer"])
    precision: Precision = build(config["precision"])
    if worker.device.type == "cpu":
        keep_freed_memory()
    strategy: Strategy = build(config["parallelism"])
    parallel = strategy.start(worker, precision)
    loader = BatchLoader(
        rows,
        batch_size=trainer.batch_size,
        gradient_accumulation_steps=trainer.accumulation_steps(parallel.dp_size),
        shuffle=shuffle,
        seed=config["seed"],
        dp_rank=parallel.dp_rank,
        dp_size=parallel.dp_size,
        pad_id=pad_id,
    )
    model = build_model(model_config, checkpoint, precision, parallel, config["seed"], new_ids)
    optimizer: torch.optim.Optimizer = build(config["optimizer"])(decay_groups(model))
    schedule = build(config["scheduler"], total_steps=trainer.total_steps(loader.steps_per_epoch))
    state = TrainState(
        model=model,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
        scaler=precision.grad_scaler(parallel.device),
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


def with_vocabulary(model: ModelConfig, folder: Path | None, tokenizer: Tokenizer) -> ModelConfig:
    """``model`` with rows for all of the tokenizer's ids; pretrained weights must be of that tokenizer."""
    fitting = fit_vocabulary(model, folder, tokenizer.vocab_size, tokenizer.new_ids)
    if folder is not None:
        for warning in compare_specials(folder, tokenizer.bos_id, tokenizer.eos_id):
            log.warning("tokenizer: %s", warning)
        if new_ids := tokenizer.new_ids:
            new = f"{len(new_ids)} new tokens, ids {new_ids.start} to {new_ids.stop - 1}"
            log.info("vocabulary: %s: their rows begin as the mean of the others", new)
    return fitting


def build_model(
    config: ModelConfig,
    checkpoint: Path | None,
    precision: Precision,
    parallel: Parallelism,
    seed: int,
    new_ids: range = range(0),
) -> Transformer:
    """The model on its device with its weights in place: built on meta, so that nothing is ever held twice."""
    with torch.device("meta"):
        model = config.build().to(precision.weights)
    parallel.place(model)
    if checkpoint is None:
        model.init_weights(seed)
    else:
        load_weights(model, checkpoint, new_ids)
    return model


def flops_counter(model: ModelConfig) -> Callable[[list[int]], float]:
    """FLOPs of one forward and backward, as a function of the real lengths of the sequences."""
    assert model.head_dim is not None  # ModelConfig resolved it
    return partial(
        training_flops,
        model.n_matmul_params(),
        model.n_layers,
        model.n_heads * model.head_dim,
    )
