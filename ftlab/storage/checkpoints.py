"""The ``checkpoints`` folder of a run: which are complete, which may go, which to resume from."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ftlab.errors import CheckpointError
from ftlab.storage import disk
from ftlab.storage.manifest import NAME, Manifest

log = logging.getLogger(__name__)

_COMPLETE = re.compile(r"step_(\d{8,})")
_UNFINISHED = re.compile(r"step_(\d{8,})\.tmp")


def step_name(step: int) -> str:
    """The folder of the checkpoint after ``step`` optimizer steps."""
    return f"step_{step:08d}"


def less_is_better(metric: str) -> bool:
    """Whether smaller values of a validation metric are better: of losses and perplexities."""
    return metric.endswith(("loss", "perplexity"))


@dataclass(frozen=True, order=True)
class Found:
    """One complete checkpoint: a folder with a manifest, whose contents nobody has checked yet."""

    step: int
    path: Path


class Checkpoints:
    """All checkpoints of one run. Only folders named as ftlab names them are ever touched.

    Args:
        folder: the run's ``checkpoints``; it need not exist.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def complete(self) -> list[Found]:
        """Those with a manifest, oldest first."""
        return [found for found in self._folders() if (found.path / NAME).is_file()]

    def incomplete(self) -> list[str]:
        """Names of those that were never finished."""
        begun = [path.name for path, _ in self._named(_UNFINISHED)]
        return begun + [found.path.name for found in self._folders() if not (found.path / NAME).is_file()]

    def describe(self) -> str:
        """What there is, for an error: the steps, and the names of the unfinished."""
        steps, unfinished = [str(found.step) for found in self.complete()], self.incomplete()
        there = f"complete checkpoints: steps {', '.join(steps)}" if steps else "no complete checkpoint"
        return there + (f"; unfinished: {', '.join(unfinished)}" if unfinished else "")

    def make(self) -> None:
        """Make the folder if there is none, and sure of its name and of those of the folders above it."""
        if not self.folder.is_dir():
            disk.make_folder(self.folder)
        for above in list(self.folder.parents)[:4]:  # the run's, its date's, outputs, and where that is
            with suppress(PermissionError):
                disk.sync_folder(above)

    def begin(self, step: int) -> Path:
        """A new folder in which to write the checkpoint of ``step``; it does not count until `commit`."""
        if not self.folder.is_dir():
            self.make()
        aside = self.aside(step)
        if aside.is_dir():  # of a write that failed
            disk.remove_folder(aside)
        disk.make_folder(aside)
        return aside

    def aside(self, step: int) -> Path:
        """Where `begin` makes it."""
        return self.folder / f"{step_name(step)}.tmp"

    def commit(self, step: int, manifest: Manifest) -> Path:
        """Complete what `begin` began: the manifest, then the names, then one rename."""
        aside, path = self.aside(step), self.folder / step_name(step)
        manifest.write(aside)
        disk.sync_folder(aside)
        disk.rename(aside, path)
        return path

    def amend(self, step: int, metrics: dict[str, float]) -> str | None:
        """Give the checkpoint of ``step`` the ``metrics`` that it lacks; its new digest, null when it lacks none."""
        folder = self.folder / step_name(step)
        manifest = Manifest.read(folder)
        if manifest.metrics:
            return None
        amended = replace(manifest, metrics=metrics)
        disk.replace_file(folder / NAME, amended.text, aside=self.folder / f".{step_name(step)}.manifest")
        disk.sync_folder(folder)
        return amended.digest

    def abandon(self, step: int) -> None:
        """Remove what `begin` began, as far as the disk lets us."""
        try:
            if self.aside(step).is_dir():
                disk.remove_folder(self.aside(step))
        except OSError as error:
            log.warning("%s could not be removed: %s", self.aside(step), error)

    def discard_unfinished(self) -> None:
        """Remove what earlier processes began and did not finish, or began to remove."""
        for path, _ in self._named(_UNFINISHED):
            disk.remove_folder(path)
        for aside in self.folder.glob(".step_*.manifest"):  # of an `amend`
            aside.unlink()

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename checkpoints later than ``step``, sound or not, which a run that goes on from there will write anew."""
        renamed = []
        for found in self._folders():
            if found.step > step:
                numbers = (f"{found.path.name}.abandoned{n or ''}" for n in range(1000))
                free = next(self.folder / name for name in numbers if not os.path.lexists(self.folder / name))
                disk.rename(found.path, free)
                renamed.append(free)
        return renamed

    def retain(self, *, keep_last: int, keep_best: int, better: Callable[[Manifest], float | None]) -> None:
        """Remove all but the newest ``keep_last`` and the best ``keep_best``.

        Args:
            better: what a checkpoint is worth, the more the better; None when it was not measured.
        """
        found = self.complete()
        keep = {one.path for one in found[-keep_last:]}
        if keep_best:
            worth = []
            for one in found:
                try:
                    value = better(Manifest.read(one.path))
                except CheckpointError as error:
                    log.warning("%s", error)  # damaged: not the best, and not ours to remove
                    keep.add(one.path)
                    continue
                if value is not None:
                    worth.append((value, -one.step, one.path))  # of equals, the one that was there first
            keep |= {path for _, _, path in sorted(worth)[-keep_best:]}
        for one in found:
            if one.path not in keep:
                aside = self.aside(one.step)
                disk.rename(one.path, aside)  # from here on it does not count, however far the removal gets
                disk.remove_folder(aside)

    def newest_sound(self, run_id: str | None, *, at_most: int | None = None) -> Found | None:
        """The newest checkpoint of which every file is as it was written; damaged ones are named and passed over.

        Args:
            run_id: whose checkpoints these should be; null: whoever's.
            at_most: the latest step to look at.
        """
        for found in reversed(self.complete()):
            if at_most is not None and found.step > at_most:
                continue
            try:
                verify(found, run_id)
            except CheckpointError as error:
                log.warning("checkpoint %s is not used: %s", found.path.name, error)
                continue
            return found
        return None

    def _folders(self) -> list[Found]:
        """All that are named as complete ones are, oldest first."""
        found = [Found(int(match[1]), path) for path, match in self._named(_COMPLETE)]
        return sorted(one for one in found if one.path.name == step_name(one.step))

    def _named(self, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
        """The folders, not links to such, whose name matches ``pattern``."""
        try:
            entries = sorted(os.scandir(self.folder), key=lambda entry: entry.name)
        except FileNotFoundError:
            return []
        matches = [(entry, pattern.fullmatch(entry.name)) for entry in entries if entry.is_dir(follow_symlinks=False)]
        return [(Path(entry.path), match) for entry, match in matches if match]


def verify(found: Found, run_id: str | None) -> Manifest:
    """The manifest of a checkpoint, once everything agrees with it.

    Raises:
        CheckpointError: naming the file that does not.
    """
    manifest = Manifest.read(found.path)
    if manifest.step != found.step:
        raise CheckpointError(found.path, f"holds step {manifest.step}: the folder was renamed")
    if run_id is not None and manifest.run != run_id:
        raise CheckpointError(found.path, f"belongs to another run ({manifest.run}, this one is {run_id})")
    manifest.verify(found.path)
    _warn_of_strangers(found.path)
    return manifest


def _warn_of_strangers(folder: Path) -> None:
    status = folder.stat()
    if hasattr(os, "geteuid") and status.st_uid not in (os.geteuid(), 0):
        log.warning("%s belongs to another user (uid %d)", folder, status.st_uid)
    if status.st_mode & stat.S_IWOTH:
        log.warning("%s can be changed by every user of this machine", folder)
