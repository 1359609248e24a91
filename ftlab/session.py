"""How one session of a run begins: in a new folder, or where a checkpoint left off."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ftlab.distributed.env import WorkerEnv
from ftlab.distributed.meeting import Team, attempt
from ftlab.errors import CheckpointError
from ftlab.outputs.folder import RunFolder, read_record
from ftlab.storage.addresses import Address, candidates, find_run
from ftlab.storage.checkpoints import Checkpoints, Found, verify
from ftlab.training import ledger
from ftlab.training.opened import Opened

log = logging.getLogger(__name__)


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


def source_of(folder: RunFolder, config: dict[str, Any], worker: WorkerEnv, team: Team | None) -> Source | None:
    """What the run begins with, as rank 0 decides; nothing in the folder has changed yet.

    Raises:
        CheckpointError: there is nothing sound to go on from.
    """
    source = _pick(folder, config) if worker.rank == 0 else None
    if team is None:
        return source
    told = json.loads(team.from_first("source", json.dumps(asdict(source) if source else None)))
    return Source(**told) if told else None


def _pick(folder: RunFolder, config: dict[str, Any]) -> Source | None:
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


def open_new(folder: RunFolder, config: dict[str, Any], source: Source | None) -> None:
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


def reopen(folder: RunFolder, config: dict[str, Any], opened: Opened, worker: WorkerEnv) -> int:
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
