"""The model of a run, as it was at one of its checkpoints or as it was exported, ready to be asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlab.assembly.model import build_model, weights_in, weights_of, with_vocabulary
from ftlab.config.build import build
from ftlab.config.resume import todays_config
from ftlab.data.tokenizers import Tokenizer
from ftlab.distributed.env import pick_device
from ftlab.distributed.precision import Precision
from ftlab.distributed.single import OneRank
from ftlab.errors import ConfigError
from ftlab.models.auto import AnyModel, as_exported, find_model
from ftlab.models.resize import end_ids
from ftlab.outputs.files import read_yaml
from ftlab.outputs.folder import read_record
from ftlab.storage.addresses import OUTPUTS, candidates, find_run
from ftlab.storage.checkpoints import Checkpoints, Found, verify
from ftlab.training.export import MANIFEST
from ftlab.training.opened import open_checkpoint

_BUILT = ("model", "tokenizer", "dataset", "precision")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model out of a run's folder, in one process.

    Attributes:
        end_ids: tokens that end an answer.
        step: optimizer steps that it was trained for; None where that is not known.
        source: what the weights were read from.
    """

    run: Path
    config: dict[str, Any]
    tokenizer: Tokenizer
    model: AnyModel
    precision: Precision
    parallel: OneRank
    end_ids: list[int]
    step: int | None
    source: Path


@dataclass(frozen=True)
class Exported:
    """The export of a run, in its folder ``export``.

    Attributes:
        step: optimizer steps that its weights were trained for; None where that is not known.
    """

    run: Path
    step: int | None

    @property
    def folder(self) -> Path:
        return self.run / "export"


def find_export(address: str) -> Exported | None:
    """The export that ``address`` means: of a run as a whole, and not older than what the run has come to since."""
    run = (OUTPUTS / "latest" if address == "latest" else Path(address).expanduser()).resolve()
    if not (run / "export" / "config.json").is_file():
        return None
    checkpoints = [found.step for found in Checkpoints(run / "checkpoints").complete()]
    exported, done = Exported(run, _step_of(run / "export")), _steps(run)
    if exported.step is None:
        return None if checkpoints else exported
    # Less was done than was exported: it went back to an earlier step, and on from there.
    is_newest = max(checkpoints, default=0) <= exported.step and (done is None or exported.step <= done)
    return exported if is_newest else None


def find_checkpoint(address: str) -> Found:
    """The checkpoint that ``address`` means, as the argument of a verb.

    Raises:
        ConfigError: there is no such run, or nothing complete of what is asked for.
        CheckpointError: none was validated, and the best is asked for.
    """
    try:
        return candidates(find_run(address, "RUN"))[0]
    except ConfigError as error:
        fix = error.fix and error.fix.removeprefix("RUN=")  # which only train.py takes in this form
        if fix == "latest" and not (OUTPUTS / "latest").exists():
            fix = "python train.py, which makes a run"
        raise ConfigError("RUN", error.problem, fix) from None


def open_trained(address: str, device: str | None = None) -> Trained:
    """The newest weights at ``address``: those that the run exported, unless a checkpoint is asked for or newer.

    Args:
        address: RUN, RUN@STEP, RUN@best, RUN/checkpoints/step_N or latest.
        device: as in the configuration; None: the run's.

    Raises:
        ConfigError: there is no such run, or nothing in it to read.
        CheckpointError: the checkpoint is damaged.
    """
    if (exported := find_export(address)) is not None:
        return _open_export(exported, device)
    found = find_checkpoint(address)
    verify(found, None)
    opened = open_checkpoint(found.path)
    config = todays_config(opened.told["config"], found.path.parent.parent, found.path, to_build=_BUILT)
    tokenizer: Tokenizer = build(config["tokenizer"])
    precision: Precision = build(config["precision"])
    parallel = OneRank(pick_device(device or config["device"]))
    model_config, _ = find_model(build(config["model"]), fetch=False)
    return Trained(
        run=found.path.parent.parent,
        config=config,
        tokenizer=tokenizer,
        model=build_model(
            with_vocabulary(model_config, None, tokenizer, opened), weights_of(opened), precision, parallel
        ),
        precision=precision,
        parallel=parallel,
        end_ids=opened.end_ids or [tokenizer.eos_id],
        step=found.step,
        source=found.path,
    )


def _open_export(exported: Exported, device: str | None) -> Trained:
    run, export = exported.run, exported.folder
    try:
        config = read_yaml(run / "config.yaml")
    except (OSError, ValueError) as error:
        raise ConfigError("RUN", f"{run} is no run's folder: {error}", "outputs/latest") from None
    config = todays_config(config, run, run, to_build=_BUILT)
    precision: Precision = build(config["precision"])
    parallel = OneRank(pick_device(device or config["device"]))
    # Its own copy of the tokenizer; one that needs no file has no path.
    own = {"path": str(export)} if "path" in config["tokenizer"] else {}
    tokenizer: Tokenizer = build(config["tokenizer"] | own)
    return Trained(
        run=run,
        config=config,
        tokenizer=tokenizer,
        model=build_model(as_exported(build(config["model"]), export), weights_in(export), precision, parallel),
        precision=precision,
        parallel=parallel,
        end_ids=end_ids(export, tokenizer.eos_id),
        step=exported.step,
        source=export,
    )


def _step_of(export: Path) -> int | None:
    try:
        return int(json.loads((export / MANIFEST).read_bytes())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _steps(run: Path) -> int | None:
    try:
        return int(read_record(run)["progress"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
