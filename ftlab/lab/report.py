"""The report on a set of runs: one HTML page that needs nothing else, and ``summary.csv``."""

from __future__ import annotations

import html
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ftlab.errors import ConfigError
from ftlab.lab.curves import pack
from ftlab.lab.runs import RunRecord, find_jobs
from ftlab.lab.statistics import Interval
from ftlab.lab.summary import Summary, summarise
from ftlab.outputs.environment import now
from ftlab.outputs.files import to_json
from ftlab.storage.disk import replace_file

PAGE, TABLE = "report.html", "summary.csv"
_PARTS = Path(__file__).parent / "page"
_SCRIPTS = ("theme.js", "table.js", "curves.js", "charts.js", "words.js", "main.js")

# Of all runs together, at 5 to 9 bytes a point before base64: the page stays below 15 MB with plotly's 5 MB.
_POINTS_OF_LOSSES, _POINTS_OF_EACH_OTHER_METRIC = 400_000, 30_000
_MAX_POINTS, _MIN_POINTS = 4000, 50
_MAX_OTHER_METRICS = 12
_MAX_SAMPLES, _MAX_ANSWERS, _MAX_CHARACTERS = 32, 4000, 4000


def write_report(
    folders: Sequence[Path],
    out: Path,
    *,
    title: str | None = None,
    metric: str | None = None,
    refresh_s: float | None = None,
) -> Path:
    """Write ``report.html`` and ``summary.csv`` into ``out``: every run in ``folders``, and every job that left none.

    Args:
        folders: runs' own, or any above them, such as a sweep's.
        title: of the page; None: the first folder's name.
        metric: by which runs are judged; None: the one they were judged by themselves.
        refresh_s: how often the page is to load itself again; None: never.

    Returns:
        The page's path.

    Raises:
        ConfigError: there is no run, none has ``metric``, or plotly is not installed.
    """
    plotly = _plotly()
    return _write(find_jobs(folders), folders, out, plotly, title, metric, refresh_s)


def watch(
    folders: Sequence[Path],
    out: Path,
    *,
    every_s: float,
    on_written: Callable[[Path, int], None],
    title: str | None = None,
    metric: str | None = None,
) -> None:
    """`write_report` again and again for as long as a run goes on; the last page no longer loads itself.

    Args:
        every_s: seconds between two of them.
        on_written: called with the page's path and the number of runs that go on.
    """
    plotly = _plotly()
    known: dict[Path, tuple[object, RunRecord]] = {}
    while True:
        runs = []
        for run in find_jobs(folders):
            state = _state(run)
            if run.folder not in known or known[run.folder][0] != state:
                known[run.folder] = (state, run)
            runs.append(known[run.folder][1])
        going_on = sum(run.goes_on for run in runs)
        page = _write(runs, folders, out, plotly, title, metric, every_s if going_on else None)
        on_written(page, going_on)
        if not going_on:
            return
        time.sleep(every_s)


def _state(run: RunRecord) -> object:
    """Changes when anything does that the report shows; whether the process still lives may change without."""
    names = ("run.json", "metrics.jsonl", "samples.jsonl", "evaluation.json")
    stats = [(run.folder / name).stat() if (run.folder / name).exists() else None for name in names]
    return [(s.st_size, s.st_mtime_ns) if s else None for s in stats], run.status, run.job


def _plotly() -> str:
    """plotly.js, as the Python package carries it; the package itself is not imported."""
    found = find_spec("plotly")
    if found is None or found.origin is None:
        raise ConfigError("report", "plotly, which draws it, is not installed", "pip install 'ftlab[report]'")
    return (Path(found.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def _write(
    runs: list[RunRecord],
    folders: Sequence[Path],
    out: Path,
    plotly: str,
    title: str | None,
    metric: str | None,
    refresh_s: float | None,
) -> Path:
    summary = summarise(runs, metric)
    if metric is not None and not any(metric in run.final_metrics for run in runs):
        logged = sorted({name for run in runs for name in run.final_metrics})
        raise ConfigError("--metric", f"no run has {metric!r}; there are {', '.join(logged) or 'no metrics'}")
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    title = title or folders[0].resolve().name
    replace_file(out / TABLE, summary.csv())
    replace_file(out / PAGE, render(title, payload(summary, out, refresh_s), plotly))
    return out / PAGE


def render(title: str, content: dict[str, Any], plotly: str) -> str:
    """The page. Users' text is in two places only: the title, escaped, and a JSON block, where no tag can begin."""
    nonce = secrets.token_urlsafe(12)
    # A browser ends a script at "</script", whatever the script's language says about strings.
    data = (
        to_json({"title": title, **content})
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
    scripts = "\n".join((_PARTS / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    parts = {
        "nonce": nonce,
        "title": html.escape(title),
        "style": (_PARTS / "page.css").read_text(encoding="utf-8"),
        "data": data,
        "plotly": plotly.replace("</script", "<\\/script"),
        "script": scripts,
    }
    page = (_PARTS / "page.html").read_text(encoding="utf-8")
    pieces = page.split("%%")  # text, name, text, name, …
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


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
    """Of training the last, and of each set that ``ftlab evaluate`` measured the newest."""
    last = max((row["step"] for row in run.samples), default=0)
    yield from (row for row in run.samples if row["step"] == last)
    evaluated = {str(one.get("on")): one for one in run.evaluations}
    for on, one in evaluated.items():
        answers = [row for row in one.get("samples") or [] if isinstance(row, dict)]
        if len(answers) <= _MAX_SAMPLES:
            yield from ({**row, "step": one.get("step") or last, "on": on} for row in answers)
