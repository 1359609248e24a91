"""The report on a set of runs: one HTML page that needs nothing else, and ``summary.csv``."""

from __future__ import annotations

import html
import secrets
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ftlab.errors import ConfigError
from ftlab.lab.payload import payload
from ftlab.lab.runs import RunRecord, find_jobs
from ftlab.lab.summary import summarise
from ftlab.outputs.files import to_json
from ftlab.storage.disk import replace_file

PAGE, TABLE = "report.html", "summary.csv"
_PARTS = Path(__file__).parent / "page"
_SCRIPTS = ("theme.js", "table.js", "curves.js", "charts.js", "words.js", "main.js")


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
