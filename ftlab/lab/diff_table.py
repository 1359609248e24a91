"""The difference of two runs, for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ftlab.lab.diff import Change, Difference
from ftlab.outputs.files import shortest

_SAMPLES = 12  # of a step, that are told


def print_difference(found: Difference) -> None:
    """Print what `diff.diff` found."""
    console = Console(highlight=False)
    names = [str(shortest(run.folder)) for run in found.runs]
    console.print(f"A  {escape(names[0])}\nB  {escape(names[1])}", soft_wrap=True)
    decisive = [change for change in found.settings if change.decides]
    _print(console, "settings", decisive, "the same", found.unknown.get("settings"))
    _print(console, "without effect on the weights", found.settings[len(decisive) :])
    _print(console, "code", found.code, unknown=found.unknown.get("code"))
    for commit in found.commits:
        console.print(f"    {escape(commit)}", soft_wrap=True)
    _print(console, "inputs", found.inputs, "the same, by fingerprint", found.unknown.get("inputs"))
    _print(console, "environment", found.environment)
    if not found.partings:
        told = f"equal to the bit at all {found.common_steps} common steps" if found.common_steps else "no common step"
        console.print(f"\n[bold]metrics[/]  {told}")
    else:
        first = found.partings[0]
        console.print(f"\n[bold]metrics[/]  part at step {first.step}")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
        for column in ("metric", "first differs at step", "A", "B"):
            table.add_column(column, justify="left" if column == "metric" else "right")
        for one in found.partings:
            table.add_row(one.metric, str(one.step), _number(one.before), _number(one.after))
        console.print(table)
        _print_samples(console, first.step, found.samples, names)
    _print(console, "at the end", found.ends)


def _print_samples(console: Console, step: int, samples: tuple[list[int], list[int]], names: list[str]) -> None:
    if not any(samples):
        return
    if samples[0] == samples[1]:
        console.print(f"  samples of step {step}, in both: {_listed(samples[0])}", soft_wrap=True)
    else:
        for name, ids in zip("AB", samples, strict=True):
            console.print(f"  samples of step {step} in {name}: {_listed(ids)}", soft_wrap=True)
    console.print(f"  to read them: ftlab replay {escape(names[0])} --step {step}", soft_wrap=True)


def _listed(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:_SAMPLES])) + (f" and {len(ids) - _SAMPLES} more" if len(ids) > _SAMPLES else "")


def _print(
    console: Console, title: str, changes: list[Change], otherwise: str = "", unknown: str | None = None
) -> None:
    told = unknown or ("" if changes else otherwise)
    if changes or told:
        console.print(f"\n[bold]{title}[/]  {told}".rstrip(), soft_wrap=True)
    if changes:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
        for change in changes:
            table.add_row(escape(change.key), escape(_shown(change.before)), "->", escape(_shown(change.after)))
        console.print(table, soft_wrap=True)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    text = _number(value) if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _number(value: float | str | None) -> str:
    return "not finite" if value is None else value if isinstance(value, str) else f"{value:.8g}"
