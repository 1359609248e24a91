"""The pictures of docs/wandb.md, drawn from a real sweep:   python docs/images/draw.py SWEEP_FOLDER

They show what W&B's panels show of the same runs: the curves of the group, and the table of its configuration.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ftlab.outputs.sweep import Job, SweepFolder

HERE = Path(__file__).parent


def series(folder: Path, metric: str) -> tuple[list[int], list[float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    points = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
    return [step for step, _ in points], [value for _, value in points]


def label(sweep: SweepFolder, job: Job) -> str:
    return " ".join(text for text in sweep.varying(job) if not text.startswith("sweep."))


def draw(sweep: SweepFolder) -> None:
    """``wandb_group.png`` (curves of all jobs) and ``wandb_runs.png`` (final value against each varying key)."""
    begun = [job for job in sweep.jobs if (sweep.path / job.folder / "metrics.jsonl").is_file()]
    colours = plt.get_cmap("viridis", len(begun))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), dpi=80, layout="constrained")
    for axis, metric in zip(axes, ("train/loss", "val/loss"), strict=True):
        for i, job in enumerate(begun):
            axis.plot(*series(sweep.path / job.folder, metric), color=colours(i), lw=1.2, label=label(sweep, job))
        axis.set(title=metric, xlabel="step")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=6)
    figure.suptitle(f"group {sweep.about['name']}", fontsize=9)
    figure.savefig(HERE / "wandb_group.png")

    rows = [
        [job.number, f"{job.status}{', ' + job.kind if job.kind else ''}", label(sweep, job), job.step,
         "" if job.value is None else f"{job.value:.4f}"]
        for job in sorted(begun, key=lambda job: job.value if job.value is not None else 1e9)
    ]  # fmt: skip
    figure, axis = plt.subplots(figsize=(9, 0.3 * len(rows) + 0.5), dpi=80, layout="constrained")
    axis.axis("off")
    table = axis.table(rows, colLabels=["job", "status", "config (varying)", "step", "val/loss"], loc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.auto_set_column_width(range(5))
    figure.savefig(HERE / "wandb_runs.png")


if __name__ == "__main__":
    draw(SweepFolder.read(sys.argv[1]))
