"""The model of a run, as it was at one of its checkpoints or as it was exported, ready to be asked."""

from __future__ import annotations

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
from ftlab.storage.checkpoints import verify
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


def open_trained(address: str, device: str | None = None) -> Trained:
    """The model at ``address``: of a run that exported its last weights those, unless a checkpoint is asked for.

    Args:
        address: RUN, RUN@STEP, RUN@best, RUN/checkpoints/step_N or latest.
        device: as in the configuration; None: the run's.

    Raises:
        ConfigError: there is no such run, or nothing in it to read.
        CheckpointError: the checkpoint is damaged.
    """
    run = (OUTPUTS / "latest" if address == "latest" else Path(address).expanduser()).resolve()
    if (run / "export" / "config.json").is_file():
        return _exported(run, device)
    found = candidates(find_run(address, "RUN"))[0]
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


def _exported(run: Path, device: str | None) -> Trained:
    export = run / "export"
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
        step=_steps(run),
        source=export,
    )


def _steps(run: Path) -> int | None:
    try:
        return int(read_record(run)["progress"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
