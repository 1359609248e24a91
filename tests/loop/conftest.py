"""Runs built by hand, without Hydra: random rows of very different length, a small random Llama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ftlab.assembly.model import build_model, random_weights, weights_in
from ftlab.data.batch import Sample
from ftlab.data.loader import BatchLoader
from ftlab.data.weights import rounded
from ftlab.distributed.base import Parallelism
from ftlab.distributed.precision import Precision
from ftlab.distributed.single import OneRank
from ftlab.losses import CrossEntropy
from ftlab.models.auto import AnyModelConfig
from ftlab.models.config import ModelConfig
from ftlab.optim.groups import decay_groups
from ftlab.optim.schedules import Constant
from ftlab.training.guard import StepGuard
from ftlab.training.run import Run
from ftlab.training.state import TrainState
from ftlab.training.trainer_config import TrainerConfig

MODEL = ModelConfig(
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=None,
    ffn_hidden_dim=64,
    vocab_size=101,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_seq_len=128,
    sliding_window=None,
    family="llama",
    rope_scaling=None,
    tie_embeddings=False,
    checkpoint=None,
)
PRECISIONS = {
    "fp32": ("float32", "float32", False),
    "bf16_mixed": ("float32", "bfloat16", False),
    "bf16": ("bfloat16", "bfloat16", False),
    "fp16_mixed": ("float32", "float16", True),
}
CPU = torch.device("cpu")


class Rows:
    """Random rows of 2 to ``longest`` tokens, the first third of each a prompt that is not trained.

    Small token ids are frequent and large ones rare, so that there is something to learn beside the rows by heart.
    """

    def __init__(self, n: int, seed: int = 0, longest: int = 60):
        random = np.random.default_rng(seed)
        frequency = 1 / np.arange(1, 102)
        frequency /= frequency.sum()
        self.rows = [
            random.choice(101, random.integers(2, longest + 1), p=frequency).astype(np.int32) for _ in range(n)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int) -> Sample:
        tokens = self.rows[index]
        return Sample(tokens=tokens, trained=np.arange(len(tokens)) >= max(1, len(tokens) // 3), sample_id=index)


class WeightedRows(Rows):
    """The same, but every third row counts a third and every seventh two and a half times as much."""

    def sample(self, index: int) -> Sample:
        plain = super().sample(index)
        weight = rounded(1 / 3) if index % 3 == 0 else 2.5 if index % 7 == 0 else 1.0
        return replace(plain, trained=plain.trained.astype(np.float32) * np.float32(weight)) if weight != 1 else plain


@dataclass
class HandRun:
    """A run and the lines it logged."""

    run: Run
    lines: list[dict[str, float]]

    @property
    def losses(self) -> list[float]:
        return [line["train/loss"] for line in self.lines]


def build_hand_run(
    rows: Rows,
    *,
    parallel: Parallelism | None = None,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    make_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    lr: float = 0.1,
    fused: bool = True,
    batch_size: int = 4,
    accumulation: int = 1,
    precision: str = "fp32",
    seed: int = 0,
    shuffle: bool = True,
    model_config: AnyModelConfig = MODEL,
    checkpoint: Path | None = None,
    **trainer: int | float | None,
) -> HandRun:
    """A run of a small model on ``rows``, here or as one rank of ``parallel``; ``fit(result.run)`` trains it."""
    defaults = {
        "max_skipped_steps": 0,
        "spike_sigma": None,
        "epochs": None,
        "max_steps": None,
        "max_steps_per_epoch": None,
        "max_grad_norm": 1.0,
        "optimizer_in_backward": False,
        "share_prefixes": False,
        "measure_lost_updates": False,
        "profile_steps": None,
    }
    settings = TrainerConfig(
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        global_batch_size=None,
        **{"log_every_steps": 1} | defaults | trainer,
    )
    numbers = precision_of(precision)
    parallel = parallel or OneRank(CPU)
    loader = BatchLoader(
        rows,
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        shuffle=shuffle,
        seed=seed,
        dp_rank=parallel.dp_rank,
        dp_size=parallel.dp_size,
        pad_id=0,
        share_prefixes=settings.share_prefixes,
    )
    fill = random_weights(seed) if checkpoint is None else weights_in(checkpoint)
    model = build_model(model_config, fill, numbers, parallel)
    make = make_optimizer or partial(optimizer, lr=lr, weight_decay=0.0, fused=fused)
    update = make(decay_groups(model))
    total = settings.total_steps(loader.steps_per_epoch)
    schedule = Constant(total_steps=total, warmup_steps=0, warmup_ratio=None)
    scaler = numbers.grad_scaler(parallel.device)
    skipping = {"max_skipped": settings.max_skipped_steps, "spike_sigma": settings.spike_sigma}
    lines: list[dict[str, float]] = []
    run = Run(
        trainer=settings,
        state=TrainState(
            model=model,
            optimizer=update,
            scheduler=torch.optim.lr_scheduler.LambdaLR(update, schedule),
            scaler=scaler,
            guard=StepGuard(update, scaler, parallel, **skipping),
        ),
        loader=loader,
        loss=CrossEntropy(label_smoothing=0.0, z_loss=0.0),
        precision=numbers,
        parallel=parallel,
        evaluator=None,
        log=lambda metrics, step: lines.append({"step": step, **metrics}),
        step_flops=lambda lengths, n_shared: float(sum(lengths) - n_shared),
        peak_flops=1e12,
    )
    return HandRun(run, lines)


def precision_of(option: str) -> Precision:
    param_dtype, compute_dtype, loss_scaling = PRECISIONS[option]
    return Precision(param_dtype=param_dtype, compute_dtype=compute_dtype, loss_scaling=loss_scaling)


@pytest.fixture
def hand_run() -> Callable[..., HandRun]:
    """Build a run: ``hand_run(rows, lr=…, batch_size=…, precision=…, …)``; ``fit(result.run)`` trains it."""
    return build_hand_run
