"""The pictures of a run, drawn from its ``metrics.jsonl``."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

_BLUE, _ORANGE, _GREY = "#2f6fb0", "#d9661f", "#5c6570"
_MAX_POINTS_WITH_MARKS = 40  # more of them run into each other

Series = tuple[np.ndarray, np.ndarray]  # steps, values


def draw_plots(folder: Path) -> list[Path]:
    """Draw ``plots/{loss,lr,throughput}.png`` for the metrics found in ``folder``.

    A metric that was never logged gives no picture; a last line torn by a kill is left out.

    Returns:
        The files written.
    """
    rows = _read(folder / "metrics.jsonl")
    (folder / "plots").mkdir(exist_ok=True)
    pictures = {"loss": _loss(rows), "lr": _learning_rate(rows), "throughput": _throughput(rows)}
    written = []
    for name, figure in pictures.items():
        if figure is not None:
            written.append(folder / "plots" / f"{name}.png")
            figure.savefig(written[-1])
    return written


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """Average over neighbours on both sides, with Gaussian weights.

    Both sides, because the usual running average trails behind: on a falling loss it draws a curve that
    lies above every point and makes validation look better than training.

    Args:
        width: standard deviation of the weights, in points.
    """
    reach = min(math.ceil(3 * width), len(values) - 1)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    covered = np.convolve(np.ones(len(values)), weights)[reach : reach + len(values)]  # less at both ends
    return np.convolve(values, weights)[reach : reach + len(values)] / covered


def _read(path: Path) -> list[dict[str, float | None]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _series(rows: Sequence[dict[str, float | None]], key: str) -> Series:
    """Steps and values of the rows that carry ``key``; a null (it was not finite) becomes a gap."""
    found = [(row["step"], row[key]) for row in rows if key in row]
    return np.array([step for step, _ in found], float), np.array([value for _, value in found], float)


def _loss(rows: Sequence[dict[str, float | None]]) -> Figure | None:
    (steps, losses), (val_steps, val_losses) = _series(rows, "train/loss"), _series(rows, "val/loss")
    if not len(steps) and not len(val_steps):
        return None
    figure, axes = _canvas("Loss", "nats per target token")
    finite = np.isfinite(losses)
    if finite.sum() >= 20:
        axes.plot(steps, losses, color=_BLUE, alpha=0.28, lw=0.9, label="training")
        smoothed = smooth(losses[finite], width=max(1.5, len(steps) / 100))
        axes.plot(steps[finite], smoothed, color=_BLUE, lw=2.0, label="training, smoothed")
    elif len(steps):
        axes.plot(steps, losses, color=_BLUE, lw=1.8, marker="o", ms=4, label="training")
    if len(val_steps):
        mark = "o" if len(val_steps) <= _MAX_POINTS_WITH_MARKS else None
        axes.plot(val_steps, val_losses, color=_ORANGE, lw=1.8, marker=mark, ms=5, label="validation")
        last = (val_steps[-1], val_losses[-1])
        axes.annotate(f"  {last[1]:.3f}", last, color=_ORANGE, fontsize=9, va="center", annotation_clip=False)
    _leave_out_the_spike(axes, np.concatenate([losses, val_losses]))
    axes.legend(loc="upper right", framealpha=0.85, edgecolor="none")
    return figure


def _leave_out_the_spike(axes: Axes, losses: np.ndarray) -> None:
    """Scale to what lasts: one diverging step must not flatten the whole curve."""
    finite = losses[np.isfinite(losses)]
    if len(finite) >= 100 and finite.max() > 3 * (limit := np.percentile(finite, 99)):
        axes.set_ylim(finite.min() - 0.05 * limit, 1.1 * limit)


def _learning_rate(rows: Sequence[dict[str, float | None]]) -> Figure | None:
    steps, rates = _series(rows, "train/lr")
    if not len(steps):
        return None
    figure, axes = _canvas("Learning rate", "learning rate")
    mark = "o" if len(steps) <= _MAX_POINTS_WITH_MARKS else None
    axes.plot(steps, rates, color=_BLUE, lw=2.0, marker=mark, ms=4)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.1e}" if rate else "0"))
    return figure


def _throughput(rows: Sequence[dict[str, float | None]]) -> Figure | None:
    steps, rates = _series(rows, "perf/tokens_per_s")
    if not len(steps):
        return None
    figure, axes = _canvas("Throughput", "real tokens per second (padding not counted)")
    mark = "o" if len(steps) <= _MAX_POINTS_WITH_MARKS else None
    axes.plot(steps, rates, color=_BLUE, lw=1.2, marker=mark, ms=4)
    median = float(np.nanmedian(rates))
    axes.axhline(median, color=_GREY, lw=1.0, ls=(0, (4, 3)), label=f"median {median:,.0f}")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.0f}"))
    axes.legend(loc="lower right", framealpha=0.85, edgecolor="none")
    return figure


def _canvas(title: str, y_label: str) -> tuple[Figure, Axes]:
    """An empty picture in the house's looks, without pyplot: its global state is not ours to change."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color="#20262d", pad=10)
    axes.set_xlabel("optimizer step", color=_GREY)
    axes.set_ylabel(y_label, color=_GREY)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#e3e6ea", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b9c0c8")
    axes.tick_params(colors=_GREY, length=0)
    return figure, axes


def draw_lengths(histograms: Mapping[str, Mapping[str, list[float]]], seq_len: int, path: Path) -> None:
    """Write how long rows are, in tokens, to ``path``: a histogram (``edges``, ``counts``) for each name."""
    figure, axes = _canvas("Length of the rows", "rows")
    axes.set_xlabel("tokens", color=_GREY)
    for (name, histogram), color in zip(histograms.items(), itertools.cycle((_BLUE, _ORANGE, _GREY)), strict=False):
        axes.stairs(histogram["counts"], histogram["edges"], fill=True, alpha=0.6, color=color, label=name)
    axes.axvline(seq_len, color=_GREY, lw=1.0, ls=(0, (4, 3)), label=f"seq_len {seq_len:,}")
    axes.legend(loc="upper right", framealpha=0.85, edgecolor="none")
    figure.savefig(path)
