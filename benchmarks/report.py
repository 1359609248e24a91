"""The report on a large sweep: how long its page takes to write and to open, and how large it is.

    python benchmarks/report.py [--runs 200] [--steps 2000] [--repeat 5] [--keep FOLDER]

Makes run folders as training leaves them (nine metrics a step, validation every 50 steps, 8 samples), writes their
report, and opens it from its file in a headless Chromium, 1440 × 900, a new browser each time. "first view" is when the
page has drawn what its window shows, "all" when it has drawn every section; both count from the start of loading.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for what the tests have: a browser, and run folders without training

from ftlab.lab.report import write_report  # noqa: E402
from tests.lab.browser import CHROMIUM, chromium  # noqa: E402
from tests.lab.folders import make_run  # noqa: E402

RATES, DIMS, LAYERS, SEEDS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (64, 128, 192, 256), (2, 4), range(5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="run folders (default 200)")
    parser.add_argument("--steps", type=int, default=2000, help="logged steps of each (default 2000)")
    parser.add_argument("--repeat", type=int, default=5, help="times that the page is opened (default 5)")
    parser.add_argument("--keep", type=Path, help="make the folders here and leave them; those that are there are used")
    arguments = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("no Chromium here: chromium, chromium-browser or google-chrome has to be on PATH")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        make_sweep(folder, arguments.runs, arguments.steps)
        start = time.perf_counter()
        page = write_report([folder], folder)
        print(f"written     {time.perf_counter() - start:6.2f} s")
        print(f"size        {page.stat().st_size / 1e6:6.2f} MB")
        opened = [open_page(page) for _ in range(arguments.repeat)]
        for name, key in (("first view", "drawn"), ("all", "complete")):
            times = [one[key] for one in opened]
            print(f"{name:<10}  {statistics.median(times):6.2f} s   ({min(times):.2f} to {max(times):.2f})")


def make_sweep(folder: Path, n_runs: int, n_steps: int) -> None:
    """Runs that differ in learning rate, width, depth and seed; a few diverged, a few ran out of memory."""
    for job in range(n_runs):
        rate, dim = RATES[job % 5], DIMS[job // 5 % 4]
        n_layers, seed = LAYERS[job // 20 % 2], SEEDS[job // 40 % 5]
        changes = {"optimizer.lr": rate, "model.dim": dim, "model.n_layers": n_layers, "seed": seed + job // 200 * 5}
        name = f"{job}_model.dim={dim},model.n_layers={n_layers},optimizer.lr={rate},seed={changes['seed']}"
        if not (folder / name).exists():
            make_run(folder / name, changes=changes, **_history(job, rate, dim, n_layers, n_steps))


def _history(job: int, rate: float, dim: int, n_layers: int, n_steps: int) -> dict[str, Any]:
    draw = random.Random(job)
    failed = {17: "diverged", 31: "out_of_memory"}.get(job % 40)
    n_steps = n_steps // 3 if failed else n_steps
    floor = 1.9 - 0.1 * math.log(dim * n_layers) + 0.05 * abs(math.log(rate / 3e-3)) ** 1.5
    speed = 4e6 / (dim * n_layers)

    def loss_at(step: int) -> float:
        return floor + 3 * math.exp(-step / 60) + 1.2 * (1 + step) ** -0.4

    rows: list[dict[str, Any]] = []
    for step in range(1, n_steps + 1):
        row = {
            "step": step,
            "tokens": 4096 * step,
            "train/loss": loss_at(step) + draw.gauss(0, 0.06),
            "train/lr": rate * min(1.0, step / 60) * 0.5 * (1 + math.cos(math.pi * step / n_steps)),
            "train/grad_norm": abs(draw.gauss(1, 0.3)) + 8 / step,
            "perf/tokens_per_s": speed * draw.uniform(0.95, 1.0),
            "perf/mfu": 0.45 * draw.uniform(0.95, 1.0),
            "perf/data_wait_frac": 0.004 * draw.random(),
            "memory/peak_gib": dim * n_layers / 700,
        }
        if step % 50 == 0:
            row |= {"val/loss": loss_at(step) + 0.05 + draw.gauss(0, 0.004), "val/exact_match": min(1, step / 4000)}
        rows.append(row)
    samples = [
        {
            "step": n_steps,
            "sample_id": i,
            "prompt": f"### Instruction:\nWhat is {37 * i} + {11 * i}?\n\n### Response:\n",
            "generated": f"The sum is {48 * i + draw.randrange(2)}. " + "It is added digit by digit. " * 6,
            "reference": str(48 * i),
            "correct": draw.random() < 0.5,
        }
        for i in range(8)
    ]
    told: dict[str, Any] = {"metrics": rows, "samples": samples, "duration_s": 4096 * n_steps / speed}
    if failed:
        message = "loss is nan" if failed == "diverged" else "CUDA out of memory"
        return told | {"status": "failed", "error": {"type": failed, "kind": failed, "message": message}}
    last = [row for row in rows if "val/loss" in row][-1:] or rows[-1:]
    final = {key: value for key, value in last[0].items() if "/" in key}
    return told | {"final": final, "progress": {"step": n_steps, "tokens": 4096 * n_steps}}


def open_page(path: Path) -> dict[str, float]:
    """Seconds until the page said that it had drawn."""
    with chromium() as page:
        page.look(1440, 900)
        page.open(path)
        told = json.loads(page.run("JSON.stringify(document.documentElement.dataset)"))
        assert not page.complaints, page.complaints
    return {key: int(told[key]) / 1000 for key in ("drawn", "complete")}


if __name__ == "__main__":
    main()
