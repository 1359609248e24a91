"""What the report's page shows of a set of runs, as JSON: labels, curves, seeds and answers, each within a size."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ftlab.lab.curves import pack
from ftlab.lab.runs import RunRecord
from ftlab.lab.statistics import Interval
from ftlab.lab.summary import Summary
from ftlab.outputs.environment import now

# Of all runs together, at 5 to 9 bytes a point before base64: the page stays below 15 MB with plotly's 5 MB.
_POINTS_OF_LOSSES, _POINTS_OF_EACH_OTHER_METRIC = 400_000, 30_000
_MAX_POINTS, _MIN_POINTS = 4000, 50
_MAX_OTHER_METRICS = 12
_MAX_SAMPLES, _MAX_ANSWERS, _MAX_CHARACTERS = 32, 4000, 4000


def payload(summary: Summary, out: Path, refresh_s: float | None) -> dict[str, Any]:
    """What the page shows, as JSON."""
    return {
        "written": now().isoformat(timespec="seconds"),
        "refresh_s": refresh_s,
        "metric": summary.metric,
        "less_is_better": summary.sign == 1,
        "best": summary.best,
        "columns": [
            {
                "key": column.key,
                "label": column.label,
                "setting": column.is_setting,
                "numeric": column.numeric,
                "hint": column.hint,
                "cells": column.cells,
            }
            for column in summary.columns
        ],
        "results": summary.results,
        "runs": [_run(run, label, out) for run, label in zip(summary.runs, labels(summary.runs), strict=True)],
        "curves": _curves(summary),
        "seeds": _seeds(summary),
        "fronts": {
            "perf/tokens_per_s": summary.front("perf/tokens_per_s", more_is_better=True),
            "memory/peak_gib": summary.front("memory/peak_gib", more_is_better=False),
        },
        "samples": _samples(summary.runs),
    }


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """What to call each run: its name, or where several share it a job's number, its folder, or its folder's place."""
    numbered = all(re.match(r"\d+_", run.folder.name) for run in runs) and len({run.folder.parent for run in runs}) == 1
    named = all(run.config for run in runs) or not numbered  # a job that never began has no name of its own
    kinds: list[Callable[[RunRecord], str]] = [lambda run: run.name] if named else []
    kinds += [lambda run: f"#{run.folder.name.partition('_')[0]}"] if numbered else []
    kinds += [lambda run: run.folder.name, lambda run: f"{run.folder.parent.name}/{run.folder.name}"]
    for name in kinds:
        found = [name(run) for run in runs]
        if len(set(found)) == len(found):
            return found
    return [str(run.folder) for run in runs]


def _run(run: RunRecord, label: str, out: Path) -> dict[str, Any]:
    names = ("train.log", "metrics.jsonl", "config.yaml", "data_check.html", "plots/loss.png")
    return {
        "label": label,
        "name": run.name,
        "path": str(run.folder),
        "link": _link(run.folder, out) if run.folder.is_dir() else None,
        "files": {name: _link(run.folder / name, out) for name in names if (run.folder / name).is_file()},
        "status": run.status,
        "error": run.error,
        "seed": run.seed,
        "step": run.step,
        "overrides": run.overrides,
        "started": run.record.get("started"),
        "pace": _pace(run),
    }


def _link(path: Path, out: Path) -> str:
    """Relative, so that the page and the folders can be moved together."""
    return quote(os.path.relpath(path, out)) + ("/" if path.is_dir() else "")


def _pace(run: RunRecord) -> list[list[float]]:
    """Steps and the tokens seen by then, at some of the steps: it is close to a line."""
    known = [(step, tokens) for step, tokens in run.series("tokens") if tokens is not None]
    if not known:
        return []
    picked = [known[i] for i in range(0, len(known), max(1, len(known) // 30))]
    return [list(pair) for pair in ((0, 0), *picked, known[-1])]


def _curves(summary: Summary) -> dict[str, list[dict[str, str | int] | None]]:
    """For every metric a curve of each run, or None."""
    names = dict.fromkeys(["train/loss", summary.metric, "val/loss"])
    losses = len(names)
    others = dict.fromkeys(name for run in summary.runs for name in run.metric_names if name not in ("epoch", "tokens"))
    names |= dict.fromkeys(sorted(set(others) - set(names), key=lambda n: n.count("/") > 1)[:_MAX_OTHER_METRICS])
    curves = {}
    for i, name in enumerate(names):
        budget = _POINTS_OF_LOSSES if i < losses else _POINTS_OF_EACH_OTHER_METRIC
        n_points = min(_MAX_POINTS, max(_MIN_POINTS, budget // len(summary.runs)))
        series = [run.series(name) for run in summary.runs]
        if any(series):
            curves[name] = [pack(one, n_points) if one else None for one in series]
    return curves


def _seeds(summary: Summary) -> dict[str, Any] | None:
    """Each group of runs that differ in their seed only, and its differences to every other group."""
    if not summary.groups:
        return None

    def told(one: Interval | None) -> dict[str, Any] | None:
        return None if one is None else asdict(one)

    over_seeds = summary.over_seeds()
    return {
        "groups": [
            {"name": summary.named(group), "runs": group, **(told(one) or {})}
            for group, one in zip(summary.groups, over_seeds, strict=True)
        ],
        "differences": [[told(one) for one in summary.against(i)] for i in range(len(summary.groups))],
    }


def _samples(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The last answers of every run, and those of a small evaluation since, by prompt; what is long is cut."""
    prompts: dict[str, dict[str, Any]] = {}
    left = _MAX_ANSWERS
    for i, run in enumerate(runs):
        for row in _last_answers(run):
            prompt = str(row.get("prompt", ""))
            if left == 0 or (prompt not in prompts and len(prompts) == _MAX_SAMPLES):
                continue
            one = prompts.setdefault(prompt, {"prompt": prompt[:_MAX_CHARACTERS], "reference": None, "answers": []})
            one["reference"] = one["reference"] or str(row.get("reference", ""))[:_MAX_CHARACTERS]
            answer = str(row.get("generated", ""))[:_MAX_CHARACTERS]
            told = {"run": i, "step": row["step"], "text": answer, "correct": row.get("correct")}
            if not any(told.items() <= known.items() for known in one["answers"]):  # measured again, answered the same
                left -= 1
                one["answers"].append({**told, "on": row.get("on")})
    return list(prompts.values())


def _last_answers(run: RunRecord) -> Iterator[dict[str, Any]]:
    """Of training the last, and of each set that ``ftlab evaluate`` measured those of the latest step."""
    last = max((row["step"] for row in run.samples), default=0)
    yield from (row for row in run.samples if row["step"] == last)
    evaluated = {str(one.get("on")): one for one in run.evaluations_by_step}
    for on, one in evaluated.items():
        answers = [row for row in one.get("samples") or [] if isinstance(row, dict)]
        if len(answers) <= _MAX_SAMPLES:
            yield from ({**row, "step": one.get("step") or last, "on": on} for row in answers)
