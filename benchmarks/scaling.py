"""Real tokens/s over numbers of ranks and over lengths of rows: ``benchmarks/step.py``, once for each.

    python benchmarks/scaling.py [--ranks 1 2 4] [--lengths 512 2048 8192] [overrides for all]
    python benchmarks/scaling.py parallelism=fsdp model=llama2_7b model.checkpoint=null precision=bf16

Ranks work on as many rows each (weak scaling); efficiency is the rate per rank over that of the fewest ranks. Over
lengths a step keeps its tokens: longer rows are fewer. On a CPU the ranks share the cores, and efficiency says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def step(n_ranks: int, overrides: list[str], n_steps: int) -> dict[str, Any]:
    """The figures of rank 0, whose rows are counted; every rank has as many."""
    workers = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"] if n_ranks > 1 else []
    command = [sys.executable, *workers, str(HERE / "step.py"), "--steps", str(n_steps), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    last = [line for line in done.stdout.splitlines() if line.startswith("{")][-1]
    found: dict[str, Any] = json.loads(last)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--lengths", type=int, nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=8192, help="of a step on one rank, with --lengths")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    arguments = parser.parse_args()
    print(
        "| ranks | seq_len | tokens/s of a rank | of all | efficiency | peak GiB of a rank |\n|---|---|---|---|---|---|"
    )
    first: dict[int, float] = {}
    for n_ranks in arguments.ranks:
        for length in arguments.lengths or [None]:
            sized: list[str] = []
            if length is not None:
                sized = [f"seq_len={length}", f"trainer.batch_size={max(1, arguments.tokens // length)}"]
            found = step(n_ranks, [*sized, *arguments.overrides], arguments.steps)
            rate = found["tokens_per_s"]
            efficiency = rate / first.setdefault(found["seq_len"], rate)
            print(
                f"| {n_ranks} | {found['seq_len']} | {rate:,.0f} | {rate * n_ranks:,.0f} | {efficiency:.0%} "
                f"| {found['peak_memory_gib']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
