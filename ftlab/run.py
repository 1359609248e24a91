"""The composition root: one resolved configuration becomes one run.

Everything else in the package takes plain arguments; this module reads the
configuration, builds the parts, hands them to the loop and keeps the run folder.
"""

from __future__ import annotations

import logging
import multiprocessing
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ftlab.config.build import build
from ftlab.data.loader import BatchLoader, SampleSource
from ftlab.data.sft import InstructDataset
from ftlab.data.tokenizers import Tokenizer
from ftlab.distributed.base import Parallelism
from ftlab.distributed.env import describe_device, keep_freed_memory, peak_flops, pick_device
from ftlab.distributed.precision import Precision
from ftlab.errors import ConfigError, FtlabError
from ftlab.loggers.base import RunInfo
from ftlab.loggers.recorder import Recorder
from ftlab.models.transformer import ModelConfig, Transformer
from ftlab.models.weights import load_weights, resolve_checkpoint
from ftlab.optim.groups import decay_groups
from ftlab.outputs import RunFolder, Status, mask_secrets, setup_logging
from ftlab.training.checkpoint import CheckpointConfig, export_model
from ftlab.training.evaluate import Evaluator
from ftlab.training.loop import Run, TrainerConfig, fit
from ftlab.training.metrics import training_flops
from ftlab.training.state import TrainState

Config = dict[str, Any]
log = logging.getLogger(__name__)


def launch(config: Config, *, own_process: bool) -> int:
    """Train ``config`` here, or in a process of its own so that the jobs of a sweep share no state.

    Returns:
        The exit code: 0 completed, 1 a bug or the machine, 2 bad input, 3 non-finite numbers, 130 interrupted.
    """
    if config["seed"] is None:  # drawn once, before any worker starts, and recorded like a given one
        config = config | {"seed": secrets.randbelow(2**31)}
    if not own_process:
        return train(config)
    # spawn, not fork: threads of this process (BLAS, W&B) do not survive a fork.
    process = multiprocessing.get_context("spawn").Process(target=_train_and_exit, args=(config,))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.join()  # Ctrl-C reached the child as well: let it close its folder
        raise
    assert process.exitcode is not None
    if process.exitcode < 0:  # killed: it could not say so itself
        error = FtlabError(f"the job's process was killed by signal {-process.exitcode}")
        print(error, file=sys.stderr)
        RunFolder(config["paths"]["output_dir"]).finish("failed", error=error)
        return 128 - process.exitcode
    return process.exitcode


def _train_and_exit(config: Config) -> None:
    raise SystemExit(train(config))


def train(config: Config) -> int:
    """Train in this process; the run folder says how it ended, whatever happens. Returns the exit code."""
    folder = RunFolder(config["paths"]["output_dir"])
    folder.write_config(config)
    setup_logging(folder.path, rank=0)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    folder.start(gpus=gpus, name=config["run_name"], seed=config["seed"])
    folder.link_latest()
    recorder = Recorder(folder, [build(node) for node in config["logger"].values()])
    try:
        _train(config, recorder)
    except (Exception, KeyboardInterrupt) as error:
        status, exit_code = _verdict(error)
        recorder.finish(status, error)
        return exit_code
    recorder.finish("completed", None)
    return 0


def _verdict(error: BaseException) -> tuple[Status, int]:
    """Say what went wrong, once and in the user's terms; only our own bugs show a traceback."""
    match error:
        case KeyboardInterrupt():
            log.warning("interrupted")
            return "preempted", 130
        case FtlabError():
            log.error("%s", error)
            return "failed", error.exit_code
        case torch.OutOfMemoryError() | MemoryError():
            log.error("out of memory: %s\n  try: a smaller trainer.batch_size", error)
            return "failed", 1
        case _:
            log.error("this is a bug in ftlab, or the machine failed:", exc_info=error)
            return "failed", 1


def _train(config: Config, recorder: Recorder) -> None:
    experiment = assemble(config, recorder)
    folder, progress = recorder.folder, experiment.run.state.progress
    folder.write_json("data_report.json", experiment.data.report)
    for warning in experiment.data.report["warnings"]:
        log.warning("data: %s", warning)
    folder.update(data_fingerprint=experiment.data.fingerprint, n_params=experiment.model_config.n_params())
    recorder.start(experiment.info(folder.path))
    try:
        fit(experiment.run)
    finally:
        folder.update(progress=asdict(progress))
        # The last line's speed is one step's; the summary wants the run's.
        recorder.latest |= {"perf/tokens_per_s": progress.tokens / progress.train_s} if progress.train_s else {}
    keep: CheckpointConfig = build(config["checkpoint"])
    if keep.export:
        run = experiment.run
        exported = export_model(
            run.state.model, experiment.tokenizer, folder.path / "export", dtype=run.precision.weights
        )
        recorder.artifacts.append(exported)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All parts of one run, assembled."""

    config: Config
    tokenizer: Tokenizer
    model_config: ModelConfig
    data: InstructDataset
    run: Run

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
            device=describe_device(run.parallel.device),
            precision=f"{run.precision.param_dtype} weights, {run.precision.compute_dtype} arithmetic",
            next_commands=(f'ftlab generate {folder} "..."',),
        )


def assemble(config: Config, recorder: Recorder) -> Experiment:
    """Build every part of a run: what can fail cheaply first, then data, then weights."""
    model_config: ModelConfig = build(config["model"])
    checkpoint = resolve_checkpoint(model_config.checkpoint) if model_config.checkpoint else None
    tokenizer: Tokenizer = build(config["tokenizer"])
    model_config = with_vocabulary(model_config, tokenizer)
    data: InstructDataset = build(
        config["dataset"],
        tokenizer=tokenizer,
        seq_len=config["seq_len"],
        seed=config["seed"],
        progress=recorder.progress,
    )
    evaluator = None
    if data.validation is not None:
        evaluator = Evaluator(
            config=build(config["evaluation"]),
            validation=data.validation,
            tokenizer=tokenizer,
            loss=replace(build(config["loss"]), label_smoothing=0.0, z_loss=0.0),
            on_samples=recorder.log_samples,
        )
    run = assemble_run(
        config, model_config, checkpoint, data.train, data.shuffle, tokenizer.pad_id, evaluator, recorder.log
    )
    return Experiment(config=config, tokenizer=tokenizer, model_config=model_config, data=data, run=run)


def assemble_run(
    config: Config,
    model_config: ModelConfig,
    checkpoint: Path | None,
    rows: SampleSource,
    shuffle: bool,
    pad_id: int,
    evaluator: Evaluator | None,
    log: Callable[[Mapping[str, float], int], None],
) -> Run:
    """What the loop needs to train ``model_config`` on ``rows`` as ``config`` says; weights are loaded here."""
    torch.manual_seed(config["seed"])
    trainer: TrainerConfig = build(config["trainer"])
    precision: Precision = build(config["precision"])
    device = pick_device(config["device"])
    if device.type == "cpu":
        keep_freed_memory()
    parallel: Parallelism = build(config["parallelism"], device=device)
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
    model = build_model(model_config, checkpoint, precision, parallel, config["seed"])
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


def with_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """``model`` with the tokenizer's vocabulary where its own is open; that of pretrained weights must agree."""
    if model.checkpoint is None or model.vocab_size is None:
        return replace(model, vocab_size=tokenizer.vocab_size)
    if model.vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            "tokenizer",
            f"it has {tokenizer.vocab_size} tokens, but the model of {model.checkpoint} has {model.vocab_size}",
            "the tokenizer the model was trained with: tokenizer.path=/path/to/the/model/folder",
        )
    return model


def build_model(
    config: ModelConfig, checkpoint: Path | None, precision: Precision, parallel: Parallelism, seed: int
) -> Transformer:
    """The model on its device with its weights in place: built on meta, so that nothing is ever held twice."""
    with torch.device("meta"):
        model = config.build().to(precision.weights)
    parallel.place(model)
    if checkpoint is None:
        model.init_weights(seed)
    else:
        load_weights(model, checkpoint)
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
