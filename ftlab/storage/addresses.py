"""What a user may call a checkpoint.

``RUN``, ``RUN@50``, ``RUN@best``, ``RUN/checkpoints/step_00000050``, or ``latest`` in place of the run's folder.
"""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlab.errors import CheckpointError, ConfigError
from ftlab.storage.checkpoints import Checkpoints, Found, less_is_better, step_name
from ftlab.storage.manifest import Manifest
from ftlab.typed import override

OUTPUTS = Path("outputs")


@dataclass(frozen=True)
class Address:
    """A run's folder and, unless it is the newest that is meant, which of its checkpoints.

    Attributes:
        at: a step, or ``best``.
    """

    run: Path
    at: int | str | None

    @property
    def checkpoints(self) -> Checkpoints:
        """All of that run's."""
        return Checkpoints(self.run / "checkpoints")


def find_run(text: str, key: str) -> Address:
    """The run that ``text`` means.

    Args:
        key: what the user gave it as, for errors.

    Raises:
        ConfigError: there is no such run, or nothing complete of what is asked for.
    """
    name, at = _taken_apart(text, key)
    run = (OUTPUTS / "latest" if name == "latest" else Path(name).expanduser()).absolute()
    if not os.path.isfile(run / "run.json"):  # which a name too long for the system is not either
        siblings = [path.parent.name for path in run.parent.glob("*/run.json")] if run.parent.is_dir() else []
        nearest = difflib.get_close_matches(run.name, siblings, n=1)
        problem = f"{run} is no run's folder: it has no run.json" if os.path.isdir(run) else f"there is no folder {run}"
        raise ConfigError(key, problem, override(key, str(run.parent / nearest[0]) if nearest else "latest"))
    address = Address(run.resolve(), at)
    steps = [found.step for found in address.checkpoints.complete()]
    if not steps or (isinstance(at, int) and at not in steps):
        wanted = f"has no checkpoint {step_name(at)}; " if isinstance(at, int) else ""
        nearest_step = min(steps, key=lambda step: abs(step - at) if isinstance(at, int) else 0, default=None)
        fix = None if nearest_step is None else override(key, f"{address.run}@{nearest_step}")
        raise ConfigError(key, f"{address.run}: {wanted}{address.checkpoints.describe()}", fix)
    return address


def _taken_apart(text: str, key: str) -> tuple[str, int | str | None]:
    path = Path(text)
    if path.parent.name == "checkpoints":
        digits = path.name.removeprefix("step_")
        if not _is_number(digits):
            raise ConfigError(key, f"{text}: a checkpoint's folder is named step_<number>")
        return str(path.parent.parent), int(digits)
    name, at_sign, at = text.rpartition("@")
    if not at_sign or "/" in at:
        return text, None
    step = at.removeprefix("step_").removeprefix("step-")
    if at != "best" and not _is_number(step):
        problem = f"{name}: after @ comes a step or best, not {at[:40]!r}"
        raise ConfigError(key, problem, override(key, f"{name}@best"))
    return name, at if at == "best" else int(step)


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 20  # Python itself reads no more than 4,300 digits


def candidates(address: Address) -> list[Found]:
    """The checkpoints that would do, the first choice first; only the newest has others to fall back on."""
    complete = address.checkpoints.complete()
    if address.at is None:
        return complete[::-1]
    if address.at != "best":
        return [found for found in complete if found.step == address.at]
    worth = []
    for found in complete:
        metrics = Manifest.read(found.path).metrics
        name, sign = deciding_metric(told(found))
        if name in metrics:
            worth.append((sign * metrics[name], found))
    if not worth:
        raise CheckpointError(
            address.checkpoints.folder, "holds no checkpoint that was validated", "checkpoint.keep_best=1"
        )
    return [max(worth, key=lambda pair: (pair[0], -pair[1].step))[1]]  # of equals, the one that was there first


def deciding_metric(told: dict[str, Any]) -> tuple[str, int]:
    """The validation metric that a run's checkpoints are compared by, and 1 where more of it is better, else -1."""
    name = str(told["config"]["evaluation"]["metric"])
    return name, -1 if less_is_better(name) else 1


def told(found: Found) -> dict[str, Any]:
    """What ``state.json`` of a checkpoint says, once it is known to be as it was written; tensors are not looked at.

    Raises:
        CheckpointError: naming the damaged file.
    """
    manifest = Manifest.read(found.path)
    manifest.verify(found.path, only=frozenset({"state.json"}))
    try:
        content = json.loads((found.path / "state.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(found.path / "state.json", f"cannot be read: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise CheckpointError(found.path / "state.json", "holds no configuration")
    return content
