"""The terminal: a banner, a live line while it trains, and a closing table.

On a terminal the line is a progress bar; written into a file or a CI log it becomes plain lines, a few dozen
per run whatever its length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from ftlab.loggers.base import RunInfo
from ftlab.outputs.files import shortest
from ftlab.outputs.folder import Status

_PLAIN_EVERY_S = 10.0
_PLAIN_EVERY_FRACTION = 0.05
_STATUS_STYLE = {"completed": "bold green", "failed": "bold red", "preempted": "bold yellow"}


class ConsoleLogger:
    """Talks to the person who started the run."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._pace = _Pace()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._first: dict[str, float] = {}  # the first and the newest value of every metric
        self._last: dict[str, float] = {}
        self._samples: list[Mapping[str, Any]] = []

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar for work before training, such as tokenisation: ``advance(n)`` after n more items."""
        if self._console.is_terminal and self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._console) as bar:
                task = bar.add_task(label, total=total)
                yield lambda n: bar.advance(task, n)
        else:
            started = time.monotonic()
            yield lambda _n: None
            self._print(f"{label}: {total:,} in {time.monotonic() - started:.1f} s")

    def start(self, info: RunInfo) -> None:
        self._info = info
        self._started = time.monotonic()
        self._heading(f"ftlab · {info.name}", "bold cyan")
        random = Text("RANDOM: nothing pretrained is loaded, this model learns from zero", "bold yellow")
        plan = f"{info.total_steps:,} steps of {info.global_batch_size:,} sequences, seed {info.seed}"
        n_train = "a stream of" if info.n_train_samples is None else f"{info.n_train_samples:,}"
        data = f"{info.dataset}: {n_train} training, {info.n_val_samples:,} validation samples"
        self._row("model", f"{info.model}, {_count(info.n_params)} parameters")
        self._row("weights", info.weights or random)
        self._row("data", data)
        self._row("plan", plan)
        self._row("device", f"{info.device}, {info.precision}")
        self._row("folder", str(shortest(info.folder)))
        self._print("")
        if self._console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[status]}"),
            )
            # Twice a second is smooth enough, and next to nothing on the cores that train.
            self._bar = Progress(*columns, console=self._console, refresh_per_second=2)
            self._task = self._bar.add_task("train", total=info.total_steps, status="")
            self._bar.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self._first.setdefault(key, value)
            self._last[key] = value
        if any(key.startswith("val/") for key in metrics):
            self._print(self._validation_line(metrics, step))
        if "train/loss" not in metrics and self._bar is None:
            return
        self._pace.at(step)
        total = self._info.total_steps
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=self._training_line(step))
        elif self._pace.line_is_due(step, total):
            self._print(f"step {step:>{len(str(total))}}/{total}  {self._training_line(step)}")

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:  # noqa: ARG002
        self._samples = list(samples)

    def finish(self, status: Status, summary: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._last |= {key: value for key, value in summary.items() if isinstance(value, int | float)}
        self._heading(f"{self._info.name} · {status}", _STATUS_STYLE.get(status, "bold"))
        self._how_it_went()
        self._some_samples()
        self._where_things_are(artifacts)
        if status == "completed":
            for label, command in zip(("next", *("",) * 9), self._info.next_commands, strict=False):
                self._row(label, Text(command, "cyan"))

    # --- lines --------------------------------------------------------------------------------------

    def _training_line(self, step: int) -> str:
        shown = (
            ("train/loss", "loss {:.3f}"),
            ("val/loss", "val {:.3f}"),
            ("perf/tokens_per_s", "{:,.0f} tokens/s"),
        )
        parts = [text.format(self._last[key]) for key, text in shown if key in self._last]
        remaining = self._pace.remaining_s(step, self._info.total_steps)
        return "  ".join([*parts, f"ETA {_duration(remaining)}"] if remaining else parts)

    def _validation_line(self, metrics: Mapping[str, float], step: int) -> str:
        parts = [f"step {step}: validation"]
        if "val/loss" in metrics:
            parts.append(f"loss {metrics['val/loss']:.4f}")
        if "val/perplexity" in metrics:
            parts.append(f"perplexity {metrics['val/perplexity']:,.2f}")
        if exact := [f"{family} {value:.0%}" for family, value in _exact_match(metrics).items()]:
            parts.append("exact match " + ", ".join(exact))
        return "  ".join(parts)

    # --- closing table ------------------------------------------------------------------------------

    def _how_it_went(self) -> None:
        for label, key in (("train loss", "train/loss"), ("val loss", "val/loss")):
            if key in self._last:
                first, last = self._first.get(key, self._last[key]), self._last[key]
                change = f"  ({last / first - 1:+.0%})" if first else ""
                self._row(label, f"{first:.4f} -> {last:.4f}{change}")
        families = _exact_match(self._last)
        width = max(map(len, families), default=0)
        for i, (family, value) in enumerate(families.items()):
            self._row("" if i else "exact match", f"{family:<{width}}  {value:>4.0%}")
        if "perf/tokens_per_s" in self._last:
            self._row("speed", f"{self._last['perf/tokens_per_s']:,.0f} tokens/s")
        if "train/skipped_steps" in self._last:
            self._row("left out", f"{self._last['train/skipped_steps']:.0f} steps with bad numbers")
        if "memory/peak_gib" in self._last:
            self._row("peak memory", f"{self._last['memory/peak_gib']:.2f} GiB")
        self._row("duration", _duration(time.monotonic() - self._started))

    def _some_samples(self) -> None:
        marks = {True: Text(" ✓", "green"), False: Text(" ✗", "red"), None: Text("")}
        for i, sample in enumerate(self._samples[:3]):
            question, answer = _last_line(sample["prompt"]), _one_line(sample["generated"])
            shown = Text(f"{question} → {answer}") if question else Text(answer)
            self._row("" if i else "samples", Text.assemble(shown, marks[sample["correct"]]))

    def _where_things_are(self, artifacts: Sequence[Path]) -> None:
        folder = self._info.folder
        self._row("folder", Text(str(shortest(folder)), "bold"))
        pictures = sorted({path.parent for path in artifacts if path.suffix == ".png"})
        others = [path for path in artifacts if path.suffix != ".png"]
        for path in (*others, *pictures, folder / "metrics.jsonl"):
            if path.exists():
                self._row("", str(path.relative_to(folder) if path.is_relative_to(folder) else path))

    # --- printing -----------------------------------------------------------------------------------

    def _heading(self, title: str, style: str) -> None:
        self._print("")
        self._print(Text(title, style))

    def _row(self, label: str, value: str | Text) -> None:
        self._print(Text(f"  {label:<12}", "dim") + (Text(value, "not dim") if isinstance(value, str) else value))

    def _print(self, line: str | Text) -> None:
        # Never wrapped, never parsed as markup: a path must survive being copied.
        self._console.print(line, soft_wrap=True, markup=False)


class _Pace:
    """How fast steps go, and when the next plain line is due."""

    def __init__(self) -> None:
        self._began: tuple[int, float] | None = None
        self._printed: tuple[int, float] | None = None

    def at(self, step: int) -> None:
        # The first step pays for compilation and allocation: the clock starts when it is done.
        self._began = self._began or (step, time.monotonic())

    def remaining_s(self, step: int, total: int) -> float | None:
        if self._began is None or step <= self._began[0]:
            return None
        first_step, since = self._began
        return (time.monotonic() - since) / (step - first_step) * (total - step)

    def line_is_due(self, step: int, total: int) -> bool:
        now = time.monotonic()
        if self._printed is not None and step != total:
            last_step, last_time = self._printed
            if step - last_step < _PLAIN_EVERY_FRACTION * total and now - last_time < _PLAIN_EVERY_S:
                return False
        self._printed = (step, now)
        return True


def _exact_match(metrics: Mapping[str, float]) -> dict[str, float]:
    prefix = "val/exact_match/"
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}


def _count(n: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return str(n)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _one_line(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _last_line(prompt: str) -> str:
    """What a rendered prompt asks: its last line that is no heading of the template."""
    lines = [line.strip() for line in prompt.splitlines() if line.strip() and not line.startswith("###")]
    return _one_line(lines[-1]) if lines else ""
