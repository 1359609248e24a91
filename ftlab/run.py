"""The composition root: one resolved configuration becomes one run.

Everything else in the package takes plain arguments; this module reads the
configuration, builds the parts, hands them to the loop and keeps the run folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import signal
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ftlab.config.build import build
from ftlab.config.layers import leaves
from ftlab.data.cache import cache_folder
from ftlab.data.dataset import Dataset
from ftlab.data.loader import BatchLoader, SampleSource
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
from ftlab.errors import CheckpointError, ConfigError, ConfigErrors, DataError, FtlabError, Interrupted
from ftlab.loggers.base import RunInfo
from ftlab.loggers.recorder import Recorder
from ftlab.models.auto import AnyModel, AnyModelConfig, find_model
from ftlab.models.hub import commit_of
from ftlab.models.resize import compare_specials, fit_vocabulary
from ftlab.models.transformer import Transformer
from ftlab.models.weights import load_weights
from ftlab.optim.groups import decay_groups
from ftlab.outputs import RunFolder, Status, mask_secrets, read_record, setup_logging, shortest
from ftlab.storage.addresses import Address, candidates, find_run
from ftlab.storage.checkpoints import Checkpoints, Found, less_is_better, verify
from ftlab.training import ledger, rng
from ftlab.training.card import model_card
from ftlab.training.checkpoint import CheckpointConfig, Checkpointer, Identity, Opened, open_checkpoint
from ftlab.training.evaluate import Evaluator
from ftlab.training.export import export_model
from ftlab.training.ledger import Ledger
from ftlab.training.loop import Run, TrainerConfig, fit
from ftlab.training.metrics import training_flops
from ftlab.training.snapshot import restore_optimizer, restore_weights
from ftlab.training.state import TrainState
from ftlab.training.wishes import ending_on_signals, ignore_signals

Config = dict[str, Any]
Fill = Callable[[AnyModel], None]
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
    source = _source(folder, config, worker, team)
    recorder = Recorder(folder, [build(node) for node in config["logger"].values()] if first else [])
    with ending_on_signals() if team is None else nullcontext():
        try:
            if first and (source is None or not source.goes_on):
                _open(folder, config, source)
            if team is not None:
                config = same_everywhere(config, team)
            stopped = _train(config, recorder, worker, team, source)
        except (Exception, KeyboardInterrupt) as error:
            ignore_signals()  # the folder is being closed
            cause = team.watch.explain(error) if team else error
            status, exit_code = _verdict(cause)
            _say(cause, aloud=team is None or team.watch.takes_the_word())
            if folder.is_open:  # not where a run could not go on: it is what it was
                try:
                    recorder.finish(status, cause, hurry=isinstance(cause, RankError))
                except OSError as problem:  # the disk is full or gone, which may be why the run ends
                    log.error("%s cannot be closed: %s", folder.path, problem)
            if team is not None and _stands_in(worker, team) and (lost := _folder_of_rank_0(config)) is not None:
                lost.finish(status, error=cause)
            return exit_code
        if stopped is None:
            recorder.finish("completed", None)
            return 0
        recorder.finish("preempted", None, stopped_by=stopped.name)
        return 128 + stopped


@dataclass(frozen=True)
class Source:
    """A checkpoint, found to be sound, that a run begins with.

    Attributes:
        goes_on: it is the run's own, and all of it counts; else another run's, whose weights do.
        completed: the run said that it had reached its end.
    """

    path: str
    goes_on: bool
    completed: bool = False


def _source(folder: RunFolder, config: Config, worker: WorkerEnv, team: Team | None) -> Source | None:
    """What the run begins with, as rank 0 decides; nothing in the folder has changed yet.

    Raises:
        CheckpointError: there is nothing sound to go on from.
    """
    source = _pick(folder, config) if worker.rank == 0 else None
    if team is None:
        return source
    told = json.loads(team.from_first("source", json.dumps(asdict(source) if source else None)))
    return Source(**told) if told else None


def _pick(folder: RunFolder, config: Config) -> Source | None:
    folder.lock()
    own, resume = Checkpoints(folder.path / "checkpoints"), config["resume"]
    if attempt() and (found := own.newest_sound(folder.recorded_id())) is not None:
        return Source(str(found.path), goes_on=True)
    if resume is not None:
        found = _soundest(Address(folder.path, resume["at"]), folder.recorded_id())
        return Source(str(found.path), goes_on=True, completed=read_record(folder.path)["status"] == "completed")
    if config["init_from"] is not None:
        return Source(str(_soundest(find_run(config["init_from"], "init_from"), None).path), goes_on=False)
    return None


def _soundest(address: Address, run_id: str | None) -> Found:
    """The checkpoint that is meant; for the newest, the first from there back that is sound."""
    if address.at is None:
        found = address.checkpoints.newest_sound(run_id)
        if found is None:
            raise CheckpointError(address.checkpoints.folder, f"holds nothing sound; {address.checkpoints.describe()}")
        return found
    [found] = candidates(address)
    verify(found, run_id)
    return found


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _open(folder: RunFolder, config: Config, source: Source | None) -> None:
    """Begin the folder of a new run, or of one that could not keep anything of its attempts so far."""
    if attempt():
        folder.cut_back(None)
        ledger.cut_back(folder.path / "ledger", 0)
        Checkpoints(folder.path / "checkpoints").set_aside_after(0)  # damaged, or they would have been gone on from
        log.warning("starting again: attempt %d", attempt() + 1)
    folder.write_config(config)
    parent = source.path if source else None
    folder.start(gpus=_gpus(), name=config["run_name"], seed=config["seed"], parent_run=parent)
    folder.link_latest()


def _reopen(folder: RunFolder, config: Config, opened: Opened, worker: WorkerEnv) -> int:
    """Go on in the folder of a run, as of its checkpoint; returns the last step that had been logged."""
    step = opened.manifest.step
    for path in Checkpoints(folder.path / "checkpoints").set_aside_after(step):
        log.warning("%s is later than step %d and set aside: %s", path.name.split(".")[0], step, path)
    last = folder.cut_back(step)
    ledger.cut_back(folder.path / "ledger", step)
    overrides = (config["resume"] or {}).get("overrides", [])
    folder.write_config(config)
    folder.resume(gpus=_gpus(), step=step, logged_until=last, overrides=overrides, ranks=worker.world_size)
    folder.link_latest()
    changed = f", with {' '.join(overrides)}" if overrides else ""
    log.info("going on from step %d%s", step, changed)
    return last


def _verdict(error: BaseException) -> tuple[Status, int]:
    """How a run ended that ``error`` ended, and the exit code."""
    match error:
        case Interrupted():
            return "preempted", 128 + error.number
        case KeyboardInterrupt():
            return "preempted", 130
        case RankError() if error.failure.interrupted:
            return "preempted", error.exit_code
        case FtlabError():
            return "failed", error.exit_code
        case _:
            return "failed", 1


_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)


def _say(error: BaseException, *, aloud: bool) -> None:
    """Say what went wrong in the user's terms; only our own bugs show a traceback. Not aloud: to the rank's file."""
    level = logging.ERROR if aloud else logging.INFO
    match error:
        case KeyboardInterrupt():
            log.log(level, "interrupted")
        case FtlabError():
            log.log(level, "%s", error)
        case OSError() if error.errno in _OF_THE_DISK:
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
    "paths.cache_dir",
    "model.checkpoint",
    "tokenizer.path",
    "dataset.data_files",
    "dataset.val_data_files",
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


def _train(
    config: Config, recorder: Recorder, worker: WorkerEnv, team: Team | None, source: Source | None
) -> signal.Signals | None:
    """Returns the signal that the run was saved and stopped for; None when it trained to its end."""
    opened = open_checkpoint(Path(source.path)) if source else None
    experiment = assemble(config, recorder, worker, team, opened, goes_on=source is not None and source.goes_on)
    run, folder = experiment.run, recorder.folder
    progress, keep = run.state.progress, build(config["checkpoint"])
    run.checkpointer = checkpointer = experiment.checkpointer(folder, keep, opened)
    logged_until = 0
    if progress.step and source and opened:
        # Stopped after the last step, a run has still to be validated and exported.
        if (
            run.is_over
            and source.completed
            and not (keep.export and not (folder.path / "export" / "config.json").exists())
        ):
            raise ConfigError(
                "resume", f"{folder.path} is complete: all {progress.step} steps are done", _prolonged(run)
            )
        if worker.rank == 0:
            logged_until = _reopen(folder, config, opened, worker)
            if (size := run.trainer.batch_size) != config["trainer"]["batch_size"]:
                log.info("trainer.batch_size=%d now, so that the ranks share each step's rows", size)
    checkpointer.prepare()
    run.ledger = Ledger(folder.path / "ledger", worker.rank)
    folder.update(global_batch_size=run.loader.global_batch_size)
    folder.write_json("data_report.json", experiment.data.report)
    if worker.rank == 0:
        (folder.path / "data_check.html").write_text(experiment.data.page(), encoding="utf-8")
        for warning in experiment.data.report["warnings"]:
            log.warning("data: %s", warning)
    folder.update(data_fingerprint=experiment.data.fingerprint, n_params=experiment.model_config.n_params())
    recorder.start(experiment.info(folder, logged_until))
    if team is not None:
        beat = team.watch.beat
        run.clock.on_enter = lambda phase: beat(progress.step + (phase != "eval"), phase)
        team.watch.leaves_signals = True
    try:
        stopped = fit(run)
        if stopped is not None:
            ignore_signals()
            saved = f"after step {progress.step}, which is saved; go on: {_go_on(folder)}"
            log.info("%s: stopped %s", stopped.name, saved if progress.step else "before the first step: none is saved")
    finally:
        checkpointer.wait()
        folder.update(progress=asdict(progress))
        # The last line's speed is one step's; the summary wants the run's.
        recorder.latest |= {"perf/tokens_per_s": progress.tokens / progress.train_s} if progress.train_s else {}
        if team is not None:
            team.watch.leaves_signals = False
    if stopped is not None:
        if team is not None:
            team.watch.stopped(128 + stopped)
    elif keep.export:
        run.clock.enter("save")
        export_model(
            run.state.model,
            experiment.tokenizer,
            folder.path / "export",
            dtype=run.precision.weights,
            precision=run.precision,
            parallel=run.parallel,
            about={"run": folder.run_id, "step": progress.step},
            card=model_card(experiment.info(folder, 0), progress, recorder.latest, commit=experiment.commit),
        )
        recorder.artifacts.append(folder.path / "export")
    run.parallel.close()
    return stopped


def _go_on(folder: RunFolder) -> str:
    return f"python train.py resume={shortest(folder.path)}"


def _prolonged(run: Run) -> str:
    trainer = run.trainer
    if trainer.max_steps is not None:
        return f"trainer.max_steps={2 * trainer.max_steps}"
    assert trainer.epochs is not None
    return f"trainer.epochs={trainer.epochs + 1}"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All parts of one run, assembled."""

    config: Config
    tokenizer: Tokenizer
    model_config: AnyModelConfig
    data: Dataset
    commit: str | None  # of the repository on the Hub that the weights came from
    run: Run

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
        )
        run.wishes.save_is_due = checkpointer.save_is_due_by_clock
        return checkpointer

    def info(self, folder: RunFolder, logged_until: int) -> RunInfo:
        """What loggers are told at the start."""
        config, run = self.config, self.run
        return RunInfo(
            folder=folder.path,
            run_id=folder.run_id,
            first_step=run.state.progress.step,
            logged_until=logged_until,
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
    model_config, pretrained = find_model(build(config["model"]), fetch=opened is None)
    if config["seq_len"] > model_config.max_seq_len:
        problem = f"{config['seq_len']} is more than the {model_config.max_seq_len} tokens that the model reads"
        raise ConfigError("seq_len", problem, f"seq_len={model_config.max_seq_len}")
    commit = commit_of(pretrained) if pretrained else None
    if opened is None:
        recorder.folder.update(weights={"checkpoint": model_config.checkpoint, "commit": commit})
    tokenizer: Tokenizer = build(beside_checkpoint(config["tokenizer"], config["model"]["checkpoint"], pretrained))
    model_config = with_vocabulary(model_config, pretrained, tokenizer, opened)
    data: Dataset = build(
        config["dataset"],
        tokenizer=tokenizer,
        seq_len=config["seq_len"],
        seed=config["seed"],
        progress=recorder.progress,
        cache_dir=cache_folder(config["paths"]["cache_dir"]),
    )
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
    accumulate = opened.told["cursor"]["global_batch_size"] if opened is not None and goes_on else None
    run = assemble_run(
        config,
        model_config,
        fill,
        data.train,
        data.shuffle,
        tokenizer.pad_id,
        evaluator,
        recorder.log,
        worker,
        global_batch_size=accumulate,
        grouped=data.group_by_length,
    )
    if opened is not None and goes_on:
        opened.restore(run.state, run.parallel)
    elif opened is not None and config["init_optimizer"]:
        restore_optimizer(run.state, opened.stored, opened.told)
    return Experiment(config=config, tokenizer=tokenizer, model_config=model_config, commit=commit, data=data, run=run)


def assemble_run(
    config: Config,
    model_config: AnyModelConfig,
    fill: Fill,
    rows: SampleSource,
    shuffle: bool,
    pad_id: int,
    evaluator: Evaluator | None,
    log: Callable[[Mapping[str, float], int], None],
    worker: WorkerEnv,
    global_batch_size: int | None = None,
    *,
    grouped: bool = False,
) -> Run:
    """What the loop needs to train ``model_config`` on ``rows`` as ``config`` says.

    Args:
        fill: gives the parameters their values.
        global_batch_size: of a run that goes on, which fixes the order of its rows; null: the configuration's.
        grouped: whether rows of like length share a micro-batch.
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
    loader = BatchLoader(
        rows,
        batch_size=trainer.batch_size,
        gradient_accumulation_steps=trainer.accumulation_steps(parallel.dp_size),
        shuffle=shuffle,
        seed=config["seed"],
        dp_rank=parallel.dp_rank,
        dp_size=parallel.dp_size,
        pad_id=pad_id,
        grouped=grouped,
    )
    model = build_model(model_config, fill, precision, parallel)
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


def _same_inputs(opened: Opened, data: Dataset, tokenizer: Tokenizer) -> None:
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
    return lambda model: restore_weights(model, opened.stored, opened.path)


def build_model(config: AnyModelConfig, fill: Fill, precision: Precision, parallel: Parallelism) -> AnyModel:
    """The model on its device with its weights in place: built on meta, so that nothing is ever held twice.

    Args:
        fill: gives the freshly allocated parameters their values.
    """
    with torch.device("meta"):
        model = config.build().to(precision.weights)
    parallel.place(model)
    fill(model)
    return model


def flops_counter(model: AnyModelConfig) -> Callable[[list[int]], float]:
    """FLOPs of one forward and backward, as a function of the real lengths of the sequences."""
    assert model.head_dim is not None  # ModelConfig resolved it
    return partial(
        training_flops,
        model.n_matmul_params(),
        model.n_layers,
        model.n_heads * model.head_dim,
    )
