"""From a configuration to a whole experiment: what can fail cheaply first, then data, then weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from ftlab.assembly.data import beside_checkpoint, is_packed, read_data, require_same_inputs
from ftlab.assembly.memory import foretell_memory, with_found_batch_size
from ftlab.assembly.model import random_weights, weights_in, weights_of, with_vocabulary
from ftlab.assembly.run import assemble_run
from ftlab.config.build import Config, build
from ftlab.data.base import TrainingData
from ftlab.data.stream import Stream
from ftlab.data.tokenizers import Tokenizer
from ftlab.distributed.activation import require_a_gpu
from ftlab.distributed.env import WorkerEnv, describe_device
from ftlab.distributed.meeting import Team
from ftlab.errors import ConfigError, DataError
from ftlab.forecast import MemoryMeter
from ftlab.loggers.base import RunInfo
from ftlab.loggers.recorder import Recorder
from ftlab.models.attention import kernel_name
from ftlab.models.auto import AnyModelConfig, find_model
from ftlab.models.compiled import require_compiler
from ftlab.models.config import ModelConfig
from ftlab.models.hub import commit_of
from ftlab.models.resize import end_ids
from ftlab.outputs.files import shortest
from ftlab.outputs.folder import RunFolder
from ftlab.outputs.secrets import mask_secrets
from ftlab.storage.checkpoints import Checkpoints, less_is_better
from ftlab.training.checkpoint import CheckpointConfig, Checkpointer, Identity
from ftlab.training.evaluate import Evaluator
from ftlab.training.metrics import GIB
from ftlab.training.opened import Opened
from ftlab.training.rehearse import Rehearsal
from ftlab.training.run import Run
from ftlab.training.snapshot import restore_optimizer
from ftlab.training.space import require_space


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All parts of one run, assembled."""

    config: Config
    tokenizer: Tokenizer
    model_config: AnyModelConfig
    data: TrainingData
    commit: str | None  # of the repository on the Hub that the weights came from
    run: Run
    end_ids: list[int]  # of tokens that end an answer
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
        by_document = is_packed(self.config) or run.trainer.share_prefixes
        seq_len, device = self.config["seq_len"], run.parallel.device
        return kernel_name(self.model_config, seq_len, run.precision.compute, device, packed=by_document)

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
                end_ids=self.end_ids,
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
            next_commands=self._next_commands(folder),
        )

    def _next_commands(self, folder: RunFolder) -> tuple[str, ...]:
        """What to type once the run is completed; nothing where it need not leave any weights."""
        checkpoint = self.config["checkpoint"]
        if checkpoint["export"]:
            return (f'ftlab generate {shortest(folder.path)} "..."',)
        return (f"ftlab export {shortest(folder.path)} OUT",) if checkpoint["at_end"] else ()


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
    if config["compile"]:
        require_compiler(worker.device)
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
        require_same_inputs(opened, data, tokenizer)
    if data.validation is None and not goes_on:
        for key, value in {
            "evaluation.patience": config["evaluation"]["patience"],
            "checkpoint.keep_best": config["checkpoint"]["keep_best"],
        }.items():
            if value:
                raise ConfigError(key, f"{value}, but there are no validation rows", "dataset.val_fraction=0.02")
    ends = opened.end_ids if opened is not None else []
    ends = ends or end_ids(pretrained, tokenizer.eos_id)
    evaluator = None
    if data.validation is not None:
        evaluator = Evaluator(
            config=build(config["evaluation"]),
            validation=data.validation,
            tokenizer=tokenizer,
            end_ids=ends,
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
    config = with_found_batch_size(config, model_config, data, worker, team)
    predicted, meter = foretell_memory(config, model_config, data, worker), MemoryMeter(worker.device)
    if team is not None:
        team.wait_for_all("build model")  # who joins a process group waits for the others in native code
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
        restore_optimizer(run.state, opened.stored, opened.told, opened.path)
    return Experiment(
        config=config,
        tokenizer=tokenizer,
        model_config=model_config,
        commit=commit,
        data=data,
        run=run,
        end_ids=ends,
        predicted=predicted,
        meter=meter,
    )
