"""One GPU, one model, one change more per rung: what each of them gives in speed and memory.

    python benchmarks/ladder.py [--steps N] [--only NAME ...] [overrides for every rung]
    python benchmarks/ladder.py --only "no recomputation" float8 trainer.batch_size=4
    python benchmarks/ladder.py --tiny              # a dry run of all rungs on a CPU, with a tiny model

Random weights and rows, so it runs without network. Padded rows are short, so a batch has sixteen of them; packed ones
are full, and two of them have about as many tokens. A rung is a process of its own (``benchmarks/step.py``); one that
fails, for lack of memory say, is a line of the table. Each adds its overrides to those of the rung that it names.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
MODEL = ["model=llama2_7b", "model.checkpoint=null", "tokenizer=byte", "model.vocab_size=32000", "seq_len=4096"]
TINY = ["model=llama_tiny", "tokenizer=byte", "seq_len=128", "device=cpu"]


class Rung(NamedTuple):
    """A change: ``more`` overrides and the kind of ``rows``, on top of the rung called ``base``."""

    name: str
    base: str | None
    more: list[str]
    rows: str = "packed"


RUNGS = [
    Rung("bf16 weights, SGD, full recomputation, padded", None, [
        "precision=bf16", "optimizer=sgd", "parallelism.activation_checkpointing=full", "trainer.batch_size=16",
    ], "padded"),
    Rung("packed", "bf16 weights, SGD, full recomputation, padded", ["trainer.batch_size=2"]),
    Rung("compile", "packed", ["compile=true"]),
    Rung("chunked loss", "compile", ["loss=chunked_cross_entropy"]),
    Rung("selective recomputation", "chunked loss", ["parallelism.activation_checkpointing=selective"]),
    Rung("no recomputation", "chunked loss", ["parallelism.activation_checkpointing=none"]),
    Rung("float8, float32 weights", "no recomputation", ["precision=fp8"]),
    Rung("AdamW, selective", "selective recomputation", ["optimizer=adamw"]),
    Rung("AdamW in backward, selective", "AdamW, selective", [
        "trainer.optimizer_in_backward=true", "trainer.max_grad_norm=null",
    ]),
    Rung("AdamW with stochastic rounding, selective", "selective recomputation", ["optimizer=adamw_bf16"]),
    Rung("8-bit AdamW, selective", "selective recomputation", ["optimizer=adamw_8bit"]),
    Rung("float32 weights, SGD in backward, full", "chunked loss", [
        "precision=bf16_mixed", "parallelism.activation_checkpointing=full",
        "trainer.optimizer_in_backward=true", "trainer.max_grad_norm=null",
    ]),
]  # fmt: skip


def overrides_of(rung: Rung) -> list[str]:
    """Its own, after those of the rungs below it; the last one of a key wins."""
    base = next((other for other in RUNGS if other.name == rung.base), None)
    merged = dict(o.split("=", 1) for o in [*(overrides_of(base) if base else []), *rung.more])
    return [f"{key}={value}" for key, value in merged.items()]


def climb(rung: Rung, shared: list[str], n_steps: int, n_warmup: int) -> dict[str, Any]:
    """The figures of one rung, or its error."""
    own = overrides_of(rung)
    if "precision=fp8" in own and "device=cpu" in shared:
        own.append("precision.emulated=true")  # no CPU multiplies in float8
    keys = {o.split("=", 1)[0] for o in shared}
    command = [sys.executable, str(HERE / "step.py"), "--steps", str(n_steps), "--warmup", str(n_warmup)]
    command += ["--rows", rung.rows, *shared, *(o for o in own if o.split("=", 1)[0] not in keys)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return {"error": last[0][:160] if last else f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="measured optimizer steps of each rung (default 10)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (default 5)")
    parser.add_argument("--only", nargs="*", default=[], help="rungs whose name contains one of these")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: do all rungs run?")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ladder.md")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for every rung")
    arguments = parser.parse_args()
    shared = [*(TINY if arguments.tiny else MODEL), *arguments.overrides]
    shared = [f"{key}={value}" for key, value in dict(o.split("=", 1) for o in shared).items()]
    lines = ["| rung | real tokens/s | MFU | peak GiB |", "|---|---|---|---|"]
    told: dict[str, Any] = {}
    for rung in RUNGS:
        if arguments.only and not any(part in rung.name for part in arguments.only):
            continue
        figures = climb(rung, shared, arguments.steps, arguments.warmup)
        told = figures if "device" in figures else told
        numbers = figures.get("error") or (
            f"{figures['tokens_per_s']:,.0f} | {figures['mfu']:.1%} | {figures['peak_memory_gib']:.1f}"
        )
        lines.append(f"| {rung.name} | {numbers} |")
        print(lines[-1], flush=True)
    head = [
        f"# {told.get('model', 'no rung ran')}, {told.get('n_params', 0):,} parameters, {told.get('device', '')}",
        "",
        f"{time.strftime('%Y-%m-%d')}, torch {told.get('torch')}, Python {told.get('python')}; "
        f"`python benchmarks/ladder.py {' '.join(sys.argv[1:])}`",
        "",
        "MFU: (6·N_matmul·tokens + 12·L·d·T² of every document) / seconds / the data sheet's dense peak.",
        "",
    ]
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
