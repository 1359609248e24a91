"""Measure one training step of a composed configuration, on generated rows.

    python benchmarks/step.py [--steps N] [--warmup N] [overrides as for train.py]
    python benchmarks/step.py model=llama2_7b model.checkpoint=null optimizer=sgd precision=bf16 seq_len=2048
    torchrun --standalone --nproc_per_node 2 benchmarks/step.py parallelism=fsdp

No data and no tokenizer file is needed: tokens are random, every position is a target, and the vocabulary
is ``model.vocab_size`` or, where that is null, the tokenizer's (``tokenizer=byte`` unless given).
Prints a table, and one JSON line with the same numbers.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ftlab.assembly.model import random_weights
from ftlab.assembly.run import assemble_run
from ftlab.config.build import build
from ftlab.config.check import compose_config
from ftlab.data.batch import Pack, Sample
from ftlab.data.loader import BatchLoader
from ftlab.distributed.env import WorkerEnv, describe_device, peak_flops
from ftlab.models.transformer import ModelConfig
from ftlab.training.loop import remaining_steps, train_step
from ftlab.training.metrics import peak_memory_gib
from ftlab.training.run import Run

MFU_FORMULA = "(6·N_matmul·tokens + 12·L·d·T²·sequences) / seconds / peak"


class RandomRows:
    """Rows of random tokens, every one trained.

    Args:
        kind: ``full``: ``length`` tokens each; ``padded``: one document each, 20 to ``length`` tokens, half of them
            below 110, about as Alpaca's; ``packed``: as many such documents as fit into ``length``.
    """

    def __init__(self, length: int, vocab_size: int, kind: str = "full"):
        self._length, self._kind, self._n_drawn = length, kind, vocab_size
        n_rows = 1024
        self._rows: list[list[int]]
        if kind == "full":
            self._rows = [[length]] * n_rows
            return
        drawn = np.random.default_rng(0).lognormal(np.log(110), 0.7, 64 * n_rows).clip(20, length).astype(int).tolist()
        self._rows = [[n] for n in drawn[:n_rows]]
        if kind == "packed":
            self._rows = [[]]
            for n in drawn:
                if sum(self._rows[-1]) + n > length:
                    self._rows.append([])
                self._rows[-1].append(n)

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> Sample | Pack:
        documents = [
            Sample(
                tokens=np.random.default_rng((index, i)).integers(0, self._n_drawn, n, dtype=np.int32),
                trained=np.ones(n, dtype=bool),
                sample_id=index,
            )
            for i, n in enumerate(self._rows[index])
        ]
        return Pack(documents, self._length) if self._kind == "packed" else documents[0]


def assemble(config: dict[str, Any], n_steps: int, kind: str = "full") -> tuple[Run, ModelConfig]:
    """The run that ``train.py`` would make of ``config``, on random rows and without logging."""
    trainer = config["trainer"] | {"epochs": None, "max_steps": n_steps}
    dataset = config["dataset"] | {"packing": "none" if kind == "padded" else "best_fit"}  # what compilation goes by
    config = config | {"trainer": trainer, "dataset": dataset, "seed": config["seed"] or 0}
    model_config: ModelConfig = replace(build(config["model"]), checkpoint=None)
    if model_config.vocab_size is None:
        model_config = replace(model_config, vocab_size=build(config["tokenizer"]).vocab_size)
    assert model_config.vocab_size is not None
    rows = RandomRows(config["seq_len"], model_config.vocab_size, kind)
    return assemble_run(
        config,
        model_config,
        random_weights(config["seed"]),
        partial(BatchLoader, rows, shuffle=False, seed=0, pad_id=0),
        None,
        lambda *_: None,
        WorkerEnv.here(config["device"]),
    ), model_config


@dataclass
class Measured:
    """What some steps took.

    Attributes:
        phases: seconds.
        n_tokens: real ones.
        flops: by the formula, of all steps.
        fastest: FLOP/s of the fastest step, on a CPU. Steps of a GPU overlap.
    """

    phases: dict[str, float] = field(default_factory=dict)
    n_tokens: int = 0
    flops: float = 0.0
    fastest: float = 0.0


def measure(run: Run, n_steps: int) -> Measured:
    """Train ``n_steps`` steps."""
    steps, measured = remaining_steps(run), Measured()
    run.clock.enter("data")
    run.clock.take()
    for _ in range(n_steps):
        start = time.perf_counter()
        micro_batches = next(steps)
        train_step(run, micro_batches)
        run.state.progress.step += 1
        run.state.progress.epoch_step += 1
        lengths = [n for batch in micro_batches for n in batch.lengths]
        flops = run.step_flops(lengths, sum(batch.n_shared for batch in micro_batches))
        measured.n_tokens += sum(lengths)
        measured.flops += flops
        measured.fastest = max(measured.fastest, flops / (time.perf_counter() - start))
        run.clock.enter("data")
    measured.phases = run.clock.take()
    run.state.guard.check()
    return measured


def benchmark(config: dict[str, Any], n_steps: int, n_warmup: int, kind: str = "full") -> dict[str, Any]:
    """All figures of one configuration."""
    run, model = assemble(config, n_warmup + n_steps, kind)
    device = run.parallel.device
    measure(run, n_warmup)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    measured = measure(run, n_steps)
    seconds = sum(measured.phases.values())
    # Where the peak is measured, a busy moment must not pass for a slow machine.
    peak = max(run.peak_flops, peak_flops(device, run.precision.compute))
    return {
        "model": config["run_name"],
        "n_params": model.n_params(),
        "device": describe_device(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "precision": f"{run.precision.param_dtype}/{run.precision.compute_dtype}",
        "optimizer": type(run.state.optimizer).__name__,
        "seq_len": config["seq_len"],
        "global_batch_size": run.loader.global_batch_size,
        "steps": n_steps,
        "step_s": seconds / n_steps,
        "rows": kind,
        "tokens_per_s": measured.n_tokens / seconds,
        "mfu": measured.flops / seconds / peak,
        "fastest_mfu": measured.fastest / peak if device.type == "cpu" else None,
        "peak_flops": peak,
        "peak_memory_gib": peak_memory_gib(device),
        "phase_share": {name: s / seconds for name, s in measured.phases.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="measured optimizer steps (default 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("--rows", choices=["full", "padded", "packed"], default="full", help="what rows look like")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    arguments = parser.parse_args()
    needs_no_file = [] if any(o.startswith("tokenizer=") for o in arguments.overrides) else ["tokenizer=byte"]
    config = compose_config([*needs_no_file, *arguments.overrides])
    figures = benchmark(config, arguments.steps, arguments.warmup, arguments.rows)
    if WorkerEnv.here(config["device"]).rank:
        return
    table = Table(title=f"{figures['model']} on {figures['device']}", show_header=False)
    rows = {
        "parameters": f"{figures['n_params']:,}",
        "precision, optimizer": f"{figures['precision']} (weights/arithmetic), {figures['optimizer']}",
        "batch": f"{figures['global_batch_size']} {figures['rows']} rows of up to {figures['seq_len']} tokens",
        "step": f"{figures['step_s'] * 1e3:,.1f} ms",
        "real tokens/s": f"{figures['tokens_per_s']:,.0f}",
        "MFU": f"{figures['mfu']:.1%} of {figures['peak_flops'] / 1e12:,.2f} TFLOP/s; {MFU_FORMULA}",
        "peak memory": f"{figures['peak_memory_gib']:.2f} GiB",
    }
    if figures["fastest_mfu"] is not None:
        rows["fastest step"] = f"MFU {figures['fastest_mfu']:.1%}; what it is measured by is a fastest product, too"
    rows |= {f"time in {name}": f"{share:.1%}" for name, share in figures["phase_share"].items()}
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
