"""Measure one training step of a composed configuration, on generated rows of full length.

    python benchmarks/step.py [--steps N] [--warmup N] [overrides as for train.py]
    python benchmarks/step.py model=llama2_7b model.checkpoint=null optimizer=sgd precision=bf16 seq_len=2048

No data and no tokenizer file is needed: tokens are random, every position is a target, and the vocabulary
is ``model.vocab_size`` or, where that is null, the tokenizer's (``tokenizer=byte`` unless given).
Prints a table, and one JSON line with the same numbers.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ftlab.assembly import assemble_run, random_weights
from ftlab.config.build import build
from ftlab.config.check import compose_config
from ftlab.data.batch import Sample
from ftlab.data.loader import BatchLoader
from ftlab.distributed.env import WorkerEnv, describe_device, peak_flops
from ftlab.models.transformer import ModelConfig
from ftlab.training.loop import Run, remaining_steps, train_step
from ftlab.training.metrics import PhaseClock, peak_memory_gib

MFU_FORMULA = "(6·N_matmul·tokens + 12·L·d·T²·sequences) / seconds / peak"


class RandomRows:
    """Rows of ``length`` random tokens, every one trained."""

    def __init__(self, length: int, vocab_size: int):
        self._tokens = np.random.default_rng(0).integers(0, vocab_size, (1024, length), dtype=np.int32)

    def __len__(self) -> int:
        return len(self._tokens)

    def sample(self, index: int) -> Sample:
        tokens = self._tokens[index]
        return Sample(tokens=tokens, trained=np.ones(len(tokens), dtype=bool), sample_id=index)


def assemble(config: dict[str, Any], n_steps: int) -> tuple[Run, ModelConfig]:
    """The run that ``train.py`` would make of ``config``, on random rows and without logging."""
    trainer = config["trainer"] | {"epochs": None, "max_steps": n_steps}
    config = config | {"trainer": trainer, "seed": config["seed"] or 0}
    model_config: ModelConfig = replace(build(config["model"]), checkpoint=None)
    if model_config.vocab_size is None:
        model_config = replace(model_config, vocab_size=build(config["tokenizer"]).vocab_size)
    assert model_config.vocab_size is not None
    rows = RandomRows(config["seq_len"], model_config.vocab_size)
    return assemble_run(
        config,
        model_config,
        random_weights(config["seed"]),
        partial(BatchLoader, rows, shuffle=False, seed=0, pad_id=0),
        None,
        lambda *_: None,
        WorkerEnv.here(config["device"]),
    ), model_config


def measure(run: Run, n_steps: int, *, synchronize: bool) -> dict[str, float]:
    """Seconds by phase over ``n_steps`` steps.

    Without ``synchronize`` only their sum means something on a GPU, and it is what training takes; with it
    every phase waits for the device, so the parts are right and the sum is a little too long.
    """
    run.clock = PhaseClock(synchronize=run.parallel.device if synchronize else None)
    steps = remaining_steps(run)
    wait = torch.cuda.synchronize if run.parallel.device.type == "cuda" else lambda: None
    wait()
    run.clock.enter("data")
    run.clock.take()
    for _ in range(n_steps):
        train_step(run, next(steps))
        run.state.progress.step += 1
        run.state.progress.epoch_step += 1
        run.clock.enter("data")
    wait()
    seconds = run.clock.take()
    run.state.guard.check()
    return seconds


def benchmark(config: dict[str, Any], n_steps: int, n_warmup: int) -> dict[str, Any]:
    """All figures of one configuration."""
    run, model = assemble(config, n_warmup + 2 * n_steps)
    device = run.parallel.device
    measure(run, n_warmup, synchronize=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = sum(measure(run, n_steps, synchronize=False).values())
    phases = measure(run, n_steps, synchronize=True)
    # Where the peak is measured, a busy moment must not pass for a slow machine.
    peak = max(run.peak_flops, peak_flops(device, run.precision.compute))
    lengths = [config["seq_len"]] * run.loader.global_batch_size
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
        "tokens_per_s": sum(lengths) * n_steps / seconds,
        "mfu": run.step_flops(lengths) * n_steps / seconds / peak,
        "peak_flops": peak,
        "peak_memory_gib": peak_memory_gib(device),
        "phase_share": {name: s / sum(phases.values()) for name, s in phases.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="measured optimizer steps (default 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    arguments = parser.parse_args()
    needs_no_file = [] if any(o.startswith("tokenizer=") for o in arguments.overrides) else ["tokenizer=byte"]
    config = compose_config([*needs_no_file, *arguments.overrides])
    figures = benchmark(config, arguments.steps, arguments.warmup)
    table = Table(title=f"{figures['model']} on {figures['device']}", show_header=False)
    rows = {
        "parameters": f"{figures['n_params']:,}",
        "precision, optimizer": f"{figures['precision']} (weights/arithmetic), {figures['optimizer']}",
        "batch": f"{figures['global_batch_size']} × {figures['seq_len']} tokens",
        "step": f"{figures['step_s'] * 1e3:,.1f} ms",
        "real tokens/s": f"{figures['tokens_per_s']:,.0f}",
        "MFU": f"{figures['mfu']:.1%} of {figures['peak_flops'] / 1e12:,.2f} TFLOP/s; {MFU_FORMULA}",
        "peak memory": f"{figures['peak_memory_gib']:.2f} GiB",
    } | {f"time in {name}": f"{share:.1%}" for name, share in figures["phase_share"].items()}
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
