"""The interpolations that ``conf/`` may use beside OmegaConf's and Hydra's own.

Arguments arrive typed (``2.0e-5`` is a float, ``null`` is None) and so do the results.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ftlab.outputs.secrets import mask_secrets

_MAX_SUBDIR_CHARS = 120  # file systems allow 255 bytes a name; a shell prompt and a table want fewer

_started = datetime.now()
_fresh: dict[tuple[str, str], str] = {}


def register() -> None:
    """Make the ``ftlab.*`` resolvers known to OmegaConf; calling it again changes nothing."""
    named: dict[str, Callable[..., Any]] = {
        "unless": _unless,
        "by_weights": _by_weights,
        "choose": _choose,
        "first": _first,
        "expanded": _expanded,
        "fresh_folder": fresh_folder,
        "sweep_subdir": sweep_subdir,
        "chosen": _chosen,
        "of_sweep": _of_sweep,
        "tags": _tags,
        "options": _options,
    }
    for name, resolver in named.items():
        OmegaConf.register_new_resolver(f"ftlab.{name}", resolver, replace=True)


def _unless(other: Any, value: Any) -> Any:
    """``${ftlab.unless:${.max_steps},3}``: 3, or null when ``max_steps`` is set."""
    return value if other is None else None


def _by_weights(checkpoint: Any, pretrained: Any, random: Any) -> Any:
    """``${ftlab.by_weights:${model.checkpoint},A,B}``: A to begin with trained weights, B with random ones."""
    return random if checkpoint is None else pretrained


def _choose(condition: Any, if_true: Any, if_false: Any) -> Any:
    """``${ftlab.choose:${a.flag},A,B}``."""
    return if_true if condition else if_false


def _first(*values: Any) -> Any:
    """``${ftlab.first:${a},${b}}``: the first that is not null, else null."""
    return next((value for value in values if value is not None), None)


def _expanded(path: Any) -> Any:
    """``${ftlab.expanded:${paths.output_dir}}``: with one's home folder in place of ``~``; null stays null."""
    return None if path is None else os.path.expanduser(str(path))


def fresh_folder(base: str, name: str, per: str = "name") -> str:
    """``base/<date>/<time>_<name>`` of this process's start, ``_2``, ``_3``... appended while that exists.

    The answer stays the same for the life of the process: Hydra composes more than once. With
    ``per="process"`` even another name gets it: the jobs of a sweep over ``model`` share one sweep folder.
    """
    key = (base, "" if per == "process" else name)
    if (before := _folders_of_the_attempt_before().get(_as_text(key))) is not None:
        return before
    if key not in _fresh:
        stem = re.sub(r"[^\w.,=+-]+", "-", mask_secrets(str(name)))  # a name is not a path: no "/" here
        _fresh[key] = _first_free(f"{base}/{_started:%Y-%m-%d}/{_started:%H-%M-%S}_{stem}")
    return _fresh[key]


def claim_folder(folder: str) -> str:
    """Create ``folder`` and return the one created.

    A folder that `fresh_folder` named is created exclusively: of two processes that were given the same
    name within one second, the second moves on to the next free number, and `fresh_folder` says so from then on.

    Raises:
        OSError: when the folder cannot be created.
    """
    keys = [key for key, known in _fresh.items() if known == folder]
    if not keys:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return folder
    stem = folder
    while True:
        try:
            Path(folder).mkdir(parents=True)
            break
        except FileExistsError:
            folder = _first_free(stem)
    for key in keys:
        _fresh[key] = folder
    if (note := _note()) is not None:
        note.write_text(json.dumps({_as_text(key): os.path.abspath(known) for key, known in _fresh.items()}))
    return folder


def _note() -> Path | None:
    """Where the attempts of one ``torchrun --max-restarts`` leave word for each other: a folder of torchrun's own."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # <folder>/attempt_<n>/<local rank>/error.json
    folder = Path(error_file).parent.parent.parent if error_file else None
    return folder / "ftlab_folders.json" if folder is not None and folder.is_dir() else None


def _folders_of_the_attempt_before() -> dict[str, str]:
    """What `fresh_folder` had said when torchrun started these workers for the first time: the run goes on there."""
    note = _note()
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or note is None or not note.exists():
        return {}
    folders: dict[str, str] = json.loads(note.read_text())
    return folders


def _as_text(key: tuple[str, str]) -> str:
    return "\n".join(key)


def _first_free(folder: str) -> str:
    numbered = (f"{folder}_{n}" for n in itertools.count(2))
    return next(path for path in itertools.chain([folder], numbered) if not os.path.lexists(path))


def sweep_subdir(number: int, overrides: str) -> str:
    """``<number>_<overrides>``, safe as a folder name and cut to a readable length; the number keeps it unique."""
    safe = re.sub(r"[^\w.,=+-]+", "-", mask_secrets(overrides)).strip("-")  # a folder's name is everybody's to read
    return f"{number}_{safe}"[:_MAX_SUBDIR_CHARS].rstrip("_-.,")


def _chosen(group: str, *, _root_: DictConfig) -> Any:
    """The option chosen for ``group``. ``${hydra:runtime.choices.x}`` fails where Hydra names a sweep's folder."""
    hydra = _root_["hydra"] if "hydra" in _root_ else HydraConfig.get()
    return hydra.runtime.choices[group]


def _of_sweep(inside: Any = None, outside: Any = None, *, _root_: DictConfig) -> Any:
    """``${ftlab.of_sweep:A,B}``: A in a job of a sweep, else B. Without A: the name of the sweep's folder."""
    hydra = _root_["hydra"] if "hydra" in _root_ else HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return outside
    return inside if inside is not None else Path(hydra.sweep.dir).name


def _tags(*groups: str, _root_: DictConfig) -> list[str]:
    """``${ftlab.tags:model,sweep}``: the options chosen for these groups, where one is."""
    hydra = _root_["hydra"] if "hydra" in _root_ else HydraConfig.get()
    return [choice for group in groups if (choice := hydra.runtime.choices.get(group)) not in (None, "null")]


def _options(*, _root_: DictConfig) -> str:
    """The table of groups for ``--help``: every group's options, the chosen ones between brackets."""
    hydra = _root_["hydra"]
    roots = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    groups: dict[str, set[str]] = {}
    for file in itertools.chain.from_iterable(root.glob("*/*.yaml") for root in roots):
        groups.setdefault(file.parent.name, set()).add(file.stem)
    lines = []
    for group in sorted(groups.keys() - {"hydra"}):
        chosen = hydra.runtime.choices.get(group)
        # A group of several options (logger) is no choice to Hydra; each of its options has its own key.
        names = [chosen] if isinstance(chosen, str) else list(_root_.get(group) or {})
        shown = (f"[{option}]" if option in names else option for option in sorted(groups[group]))
        lines.append(f"  {group:<14}{'  '.join(shown)}")
    return "\n".join(lines)
