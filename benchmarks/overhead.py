"""What a step costs beside forward, backward and optimizer: the loader, counting, log lines, W&B offline, signals.

    python benchmarks/overhead.py [--steps N]

Trains the default model with its console, metrics.jsonl and W&B (offline), every step logged, and prints milliseconds
a step by phase; "data_wait" and "other" together are the overhead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=100, help="optimizer steps (default 100; the first 10 do not count)"
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"trainer.max_steps={arguments.steps}",
            "evaluation.every_steps=1000000",
            "evaluation.at_start=false",
            "checkpoint.every_steps=null",
            f"hydra.run.dir={folder}/run",
        ]
        subprocess.run([sys.executable, "train.py", *settings, *arguments.overrides], cwd=ROOT, check=True)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    spans = [(now["tokens"] - then["tokens"]) / now["perf/tokens_per_s"] * 1e3 for then, now in pairwise(steps)]
    counted = list(zip(steps[1:], spans, strict=True))[10:]
    phases = ("data_wait", "forward", "backward", "optimizer")
    parts = {name: statistics.median(line[f"perf/{name}_frac"] * ms for line, ms in counted) for name in phases}
    parts["other"] = statistics.median(
        (1 - sum(line[f"perf/{name}_frac"] for name in phases)) * ms for line, ms in counted
    )
    for name, ms in parts.items():
        print(f"{name:>10} {ms:8.3f} ms")
    overhead, whole = parts["data_wait"] + parts["other"], statistics.median(spans[10:])
    print(f"{'overhead':>10} {overhead:8.3f} ms of {whole:.1f} ms a step")


if __name__ == "__main__":
    main()
