"""``ftlab ls`` and ``ftlab tree``: which runs there are, and which came from which. Without torch."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from ftlab.errors import ConfigError
from ftlab.lab.runs import PLACES, RunRecord, find_runs
from ftlab.outputs.files import shortest

_FILTER = re.compile(r"([\w./@-]+?)(!=|<=|>=|=|<|>)(.*)", re.DOTALL)
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge
}  # fmt: skip
_OWN: dict[str, Callable[[RunRecord], Any]] = {
    "status": lambda run: run.status,
    "name": lambda run: run.name,
    "id": lambda run: run.id,
    "seed": lambda run: run.seed,
    "step": lambda run: run.step,
    "started": lambda run: run.record.get("started"),
    "commit": lambda run: run.part("code").get("commit"),
    "parent_run": lambda run: run.record.get("parent_run"),
    "model": lambda run: _chosen(run, "model"),
    "dataset": lambda run: _chosen(run, "dataset"),
    "optimizer": lambda run: _chosen(run, "optimizer"),
}
_UNLIMITED = 100_000  # characters; wider than any line
_COLOURS = {"completed": "green", "failed": "red", "lost": "red", "preempted": "yellow", "running": "cyan"}


def value_of(run: RunRecord, key: str) -> Any:
    """A fact of the run, a setting or the last value of a metric; None where it has no such."""
    if key in _OWN:
        return _OWN[key](run)
    return run.final_metrics[key] if key in run.final_metrics else run.settings.get(key)


def _has(run: RunRecord, key: str) -> bool:
    return key in _OWN or key in run.final_metrics or key in run.settings  # which may be null


def select(words: Sequence[str], sort: str = "started") -> list[RunRecord]:
    """The runs that ``words`` mean: folders to look in, and filters (``status=failed``, ``val/loss<2``) for them.

    Args:
        sort: what to sort by; runs without it come last.

    Raises:
        ConfigError: a folder does not exist, or a filter names what no run has.
    """
    filters = [found for word in words if not Path(word).exists() and (found := _FILTER.fullmatch(word))]
    folders = [Path(word) for word in words if Path(word).exists() or not _FILTER.fullmatch(word)]
    runs = find_runs(folders or [place for place in PLACES if place.is_dir()])
    for key in [*(found[1] for found in filters), sort]:
        if runs and not any(_has(run, key) for run in runs):
            raise ConfigError(key, f"no run has such a setting, metric or fact; facts are {', '.join(_OWN)}")
    kept = [run for run in runs if all(_passes(run, *found.groups()) for found in filters)]
    known = [run for run in kept if value_of(run, sort) is not None]
    known.sort(key=lambda run: _sortable(value_of(run, sort)))
    return known + [run for run in kept if run not in known]


def _passes(run: RunRecord, key: str, relation: str, text: str) -> bool:
    value = value_of(run, key)
    if relation in _COMPARE:
        try:  # texts are compared as texts: dates
            return bool(_COMPARE[relation](value, text if isinstance(value, str) else _read(text)))
        except TypeError:  # None, or text and a number
            return False
    same = value == _read(text) or fnmatchcase(str(value), text)
    return same if relation == "=" else not same


def _read(text: str) -> Any:
    """What ``text`` stands for in a configuration."""
    try:
        return float(text)  # YAML reads 1e-5 as text
    except ValueError:
        pass
    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError:  # a pattern, such as [ab]*
        return text


def _sortable(value: Any) -> tuple[bool, Any]:
    is_number = isinstance(value, (int, float))
    return (not is_number, value if is_number else str(value))


def _chosen(run: RunRecord, group: str) -> str | None:
    """The option of a group; its component's name where only that is known."""
    if group in run.choices:
        return run.choices[group]
    typed = [text.partition("=")[2] for text in run.overrides if text.startswith(f"{group}=")]
    target = run.settings.get(f"{group}._target_")
    return typed[-1] if typed else None if target is None else str(target).rpartition(".")[2]


def as_rows(runs: Iterable[RunRecord]) -> list[dict[str, Any]]:
    """For programs."""
    return [
        {
            "folder": str(run.folder),
            **{key: read(run) for key, read in _OWN.items()},
            "overrides": run.overrides,
            "error": run.error,
            "metrics": run.final_metrics,
        }
        for run in runs
    ]


def print_runs(runs: Sequence[RunRecord], columns: Sequence[str]) -> None:
    """A table, a line a run; ``columns`` are further ones. What was typed for every run is left out."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    shared = set.intersection(*(set(run.overrides) for run in runs)) if len(runs) > 1 else set()
    for name in ("folder", "status", "step", "train/loss", "val/loss", *columns):
        left = name in ("folder", "status")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "folder", overflow="fold")
    table.add_column("typed", overflow="fold")
    for run in runs:
        colour = _COLOURS.get(run.status, "default")
        numbers = [_cell(value_of(run, key)) for key in ("step", "train/loss", "val/loss", *columns)]
        typed = " ".join(text for text in run.overrides if text not in shared and not text.startswith("paths."))
        table.add_row(
            escape(str(shortest(run.folder))), f"[{colour}]{run.status}[/]", *map(escape, numbers), escape(typed)
        )
    console = Console(highlight=False)
    if console.is_terminal:
        console.width = max(console.width, 120)
    else:  # a program that reads lines gets each run as one
        console.width = _UNLIMITED
    console.print(table if runs else "no run")


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def print_tree(runs: Sequence[RunRecord]) -> None:
    """Every run below the one whose weights it began with, with the times that it was gone on with."""
    by_folder = {run.folder: run for run in runs}
    children: dict[Path | None, list[tuple[RunRecord, str]]] = {}
    for run in runs:
        parent, step = _parent(run)
        children.setdefault(parent if parent in by_folder else None, []).append((run, _origin(parent, step, by_folder)))

    def grow(tree: Tree, folder: Path | None) -> None:
        for run, origin in children.get(folder, []):
            branch = tree.add(_label(run, origin))
            for session in run.record.get("resumed") or []:
                typed = " ".join(session.get("overrides") or [])
                branch.add(escape(f"resumed at step {session.get('step')}, {session.get('at')}  {typed}".rstrip()))
            grow(branch, run.folder)

    root = Tree("runs", hide_root=True)
    grow(root, None)
    # A label that is cut lacks its facts; what is wider than the terminal goes on in its next line.
    Console(width=_UNLIMITED, highlight=False).print(root, soft_wrap=True)


def _parent(run: RunRecord) -> tuple[Path | None, str]:
    """The folder of the run that it began with, and the step there."""
    path = run.record.get("parent_run")
    if not path:
        return None, ""
    checkpoint = Path(str(path))
    return checkpoint.parent.parent, checkpoint.name.removeprefix("step_").lstrip("0")


def _origin(parent: Path | None, step: str, known: dict[Path, RunRecord]) -> str:
    if parent is None:
        return ""
    return f"from step {step}" if parent in known else f"from {parent} at step {step}"


def _label(run: RunRecord, origin: str) -> str:
    loss = value_of(run, "val/loss")
    facts = [f"step {run.step}", *([f"val {loss:.4g}"] if loss is not None else []), *([origin] if origin else [])]
    colour = _COLOURS.get(run.status, "default")
    return f"{escape(str(shortest(run.folder)))}  [{colour}]{run.status}[/]  {escape(', '.join(facts))}"
