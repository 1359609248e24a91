"""The composition root: one resolved configuration becomes one run.

Everything else in the package takes plain arguments; this module reads the
configuration, builds the parts, hands them to the loop and keeps the run folder.
"""

from __future__ import annotations

import json
import logging
import signal
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from ftlab.assembly.experiment import Experiment, assemble
from ftlab.config.build import Config, build
from ftlab.config.layers import leaves
from ftlab.distributed.board import RankError
from ftlab.distributed.env import WorkerEnv
from ftlab.distributed.meeting import Team, meet_team
from ftlab.errors import OF_THE_DISK, ConfigError, ConfigErrors, FtlabError, Interrupted, kind_of
from ftlab.loggers.base import Logger
from ftlab.loggers.pruning import Pruning
from ftlab.loggers.recorder import Recorder
from ftlab.outputs.files import shortest
from ftlab.outputs.folder import RunFolder, Status
from ftlab.outputs.logs import setup_logging
from ftlab.session import Source, open_new, reopen, source_of
from ftlab.training.card import model_card
from ftlab.training.checkpoint import CheckpointConfig
from ftlab.training.export import export_model
from ftlab.training.ledger import Ledger
from ftlab.training.loop import fit
from ftlab.training.observers import make_observers
from ftlab.training.opened import open_checkpoint
from ftlab.training.run import Run
from ftlab.training.update import averaged
from ftlab.training.wishes import ending_on_signals, ignore_signals
from ftlab.typed import override

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
    if folder is not None:
        folder.lock()  # before anything is written, into a log of another run for example
    if team is not None:
        path = team.from_first("folder", str(folder.path) if folder else None)
        folder = folder or RunFolder(path, writes=False)
    assert folder is not None
    setup_logging(folder.path, worker.rank)
    try:
        return _train_in(folder, config, worker, team)
    finally:
        folder.unlock()


def _train_in(folder: RunFolder, config: Config, worker: WorkerEnv, team: Team | None) -> int:
    first = worker.rank == 0
    source = source_of(folder, config, worker, team)
    recorder = Recorder(folder, _loggers(config, folder) if first else [])
    with ending_on_signals() if team is None else nullcontext():
        try:
            if first and (source is None or not source.goes_on):
                open_new(folder, config, source)
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
        try:
            if stopped is None:
                recorder.finish("completed", None)
                return 0
            recorder.finish("preempted", None, stopped_by=stopped.name)
            return 128 + stopped
        except OSError as problem:
            log.error("%s cannot be closed: %s", folder.path, problem)
            return 1


def _loggers(config: Config, folder: RunFolder) -> list[Logger]:
    loggers: list[Logger] = [build(node) for node in config["logger"].values()]
    if (trial := config["sweep"]["trial"]) is not None:
        loggers.append(Pruning(folder.path.parent, trial, config["evaluation"]["metric"]))
    return loggers


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


def _say(error: BaseException, *, aloud: bool) -> None:
    """Say what went wrong in the user's terms; only our own bugs show a traceback. Not aloud: to the rank's file."""
    level = logging.ERROR if aloud else logging.INFO
    match error:
        case KeyboardInterrupt():
            log.log(level, "interrupted")
        case FtlabError():
            log.log(level, "%s", error)
        case OSError() if error.errno in OF_THE_DISK:
            log.log(level, "%s", error)
        case _ if kind_of(error) == "out_of_memory":
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
    if worker.rank == 0 and experiment.config != config:  # what was found is what a resumed run goes on with
        folder.write_config(experiment.config)
        config = experiment.config
    keep: CheckpointConfig = build(config["checkpoint"])
    run.checkpointer = experiment.checkpointer(folder, keep, opened)
    logged_until = 0
    if run.state.progress.step and source and opened:
        _refuse_what_is_done(run, folder, source, keep)
        if worker.rank == 0:
            logged_until = reopen(folder, config, opened, worker)
            if (size := run.trainer.batch_size) != config["trainer"]["batch_size"]:
                log.info("trainer.batch_size=%d now, so that the ranks share each step's rows", size)
    run.checkpointer.prepare()
    run.ledger = Ledger(folder.path / "ledger", worker.rank)
    run.checkpointer.records = [run.ledger.flush, recorder.sync]
    run.observers = make_observers(run, folder.path)
    _describe(folder, experiment, worker)
    recorder.start(experiment.info(folder, logged_until))
    stopped = _fit(experiment, recorder, team)
    if stopped is None and keep.export:
        _export(experiment, recorder)
    run.parallel.close()
    return stopped


def _refuse_what_is_done(run: Run, folder: RunFolder, source: Source, keep: CheckpointConfig) -> None:
    """A run that trained to its end has nothing to go on with, unless its last validation or export is missing."""
    exported = not keep.export or (folder.path / "export" / "config.json").exists()
    if run.is_over and source.completed and exported:
        steps = run.state.progress.step
        raise ConfigError("resume", f"{folder.path} is complete: all {steps} steps are done", _prolonged(run))


def _describe(folder: RunFolder, experiment: Experiment, worker: WorkerEnv) -> None:
    """What is known before the first step, for the run's folder; what is wrong with the data, for the user."""
    data = experiment.data
    folder.write_json("data_report.json", data.report)
    if worker.rank == 0:
        (folder.path / "data_check.html").write_text(data.page(), encoding="utf-8")
        for warning in data.report["warnings"]:
            log.warning("data: %s", warning)
    info = experiment.info(folder, 0)
    folder.update(
        data_fingerprint=data.fingerprint,
        n_params=experiment.model_config.n_params(),
        global_batch_size=experiment.run.loader.global_batch_size,
        n_train_samples=info.n_train_samples,
        device=info.device,
        attention=(attention := experiment.attention()),
    )
    if attention is not None:
        log.info("attention: %s", attention)


def _fit(experiment: Experiment, recorder: Recorder, team: Team | None) -> signal.Signals | None:
    """`fit`, with this rank's heartbeat, and signals left to the loop."""
    run, folder = experiment.run, recorder.folder
    progress = run.state.progress
    assert run.checkpointer is not None
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
        run.checkpointer.wait()
        folder.update(progress=asdict(progress), memory=experiment.memory())
        # The last line's speed is one step's; the summary wants the run's.
        recorder.latest |= {"perf/tokens_per_s": progress.tokens / progress.train_s} if progress.train_s else {}
        if team is not None:
            team.watch.leaves_signals = False
    if stopped is not None and team is not None:
        team.watch.stopped(128 + stopped)
    return stopped


def _export(experiment: Experiment, recorder: Recorder) -> None:
    """``export/``, proven to be what was trained."""
    run, folder = experiment.run, recorder.folder
    progress = run.state.progress
    run.clock.enter("save")
    with averaged(run.state.optimizer):
        export_model(
            run.state.model,
            experiment.tokenizer,
            folder.path / "export",
            dtype=run.precision.weights,
            precision=run.precision,
            parallel=run.parallel,
            end_ids=experiment.end_ids,
            about={"run": folder.run_id, "step": progress.step},
            card=model_card(experiment.info(folder, 0), progress, recorder.latest, commit=experiment.commit),
        )
    recorder.artifacts.append(folder.path / "export")


def _go_on(folder: RunFolder) -> str:
    return f"python train.py {override('resume', str(shortest(folder.path)))}"


def _prolonged(run: Run) -> str:
    trainer = run.trainer
    if trainer.max_steps is not None:
        return f"trainer.max_steps={2 * trainer.max_steps}"
    assert trainer.epochs is not None
    return f"trainer.epochs={trainer.epochs + 1}"
