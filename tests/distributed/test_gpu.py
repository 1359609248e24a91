"""What only a CUDA device can show. ``pytest -m gpu`` runs it."""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from ftlab.assembly.model import random_weights
from ftlab.assembly.run import assemble_run
from ftlab.config.build import build
from ftlab.config.check import compose_config
from ftlab.data.batch import Sample
from ftlab.data.loader import BatchLoader
from ftlab.distributed.env import WorkerEnv
from ftlab.training.loop import fit, remaining_steps, train_step
from ftlab.training.metrics import PhaseClock
from tests.distributed.strategies import strategy, train
from tests.loop.conftest import Rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GIB = 2**30


@pytest.fixture
def gpu() -> WorkerEnv:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return WorkerEnv(rank=0, local_rank=0, world_size=1, local_world_size=1, device=torch.device("cuda", 0))


# With cpu_offload fully_shard is at work on one rank too; without, there is nothing to shard among one.
@pytest.mark.parametrize(("kind", "changes"), [("single", {}), ("fsdp", {}), ("fsdp", {"cpu_offload": True})])
@pytest.mark.parametrize("precision", ["bf16_mixed", "fp16_mixed"])
def test_mixed_precision_stays_within_two_percent_of_float32(
    gpu: WorkerEnv, kind: str, changes: dict[str, Any], precision: str
) -> None:
    options: dict[str, Any] = {"lr": 0.3, "batch_size": 4, "max_steps": 100}
    exact = train(gpu, strategy("single"), Rows(200), "fp32", **options)
    mixed = train(gpu, strategy(kind, **changes), Rows(200), precision, **options)
    assert min(exact.losses) < 0.85 * exact.losses[0]
    assert mixed.losses == pytest.approx(exact.losses, rel=0.02)


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_shared_prefixes_train_as_whole_rows_do_and_twice_to_the_bit(gpu: WorkerEnv, compiled: str) -> None:
    def losses(*overrides: str) -> list[float]:
        config = compose_config(
            ["device=cuda", "tokenizer=byte", "trainer.max_steps=12", f"compile={compiled}", *overrides]
        )
        lines: list[float] = []
        run = assemble_run(
            config,
            build(config["model"]).replace(vocab_size=101),
            random_weights(0),
            partial(BatchLoader, Rows(80), shuffle=False, seed=0, pad_id=0),
            None,
            lambda line, _: lines.append(line["train/loss"]),
            gpu,
        )
        fit(run)
        return lines

    shared = losses("trainer.share_prefixes=true")
    assert shared == pytest.approx(losses(), rel=1e-3)
    assert shared == losses("trainer.share_prefixes=true")


class FullRows:
    """Rows of ``length`` random tokens, every one trained."""

    def __init__(self, length: int):
        self.tokens = np.random.default_rng(0).integers(0, 32000, (8, length), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.tokens)

    def sample(self, index: int) -> Sample:
        tokens = self.tokens[index]
        return Sample(tokens=tokens, trained=np.ones(len(tokens), dtype=bool), sample_id=index)


def peak_of_a_step(*overrides: str) -> float:
    """GiB that one optimizer step of random weights takes."""
    config = compose_config(
        ["device=cuda", "tokenizer=byte", "model.checkpoint=null", "trainer.max_steps=2", *overrides]
    )
    model = build(config["model"]).replace(vocab_size=32000)
    deal = partial(BatchLoader, FullRows(config["seq_len"]), shuffle=False, seed=0, pad_id=0)
    worker = WorkerEnv.alone(config["device"])
    run = assemble_run(config, model, random_weights(0), deal, None, lambda *_: None, worker)
    steps = remaining_steps(run)
    for _ in range(2):  # the second has the optimizer's state as well
        train_step(run, next(steps))
    run.state.guard.check()
    return torch.cuda.max_memory_allocated() / GIB


def test_memory_falls_with_what_is_recomputed(gpu: WorkerEnv) -> None:
    sizes = ["model.dim=1024", "model.n_layers=8", "model.n_heads=16", "model.ffn_hidden_dim=2816", "seq_len=1024"]
    peaks = {}
    for mode in ("full", "selective", "none"):
        torch.cuda.reset_peak_memory_stats()
        peaks[mode] = peak_of_a_step(
            "model=llama2_7b", *sizes, "precision=bf16_mixed", f"parallelism.activation_checkpointing={mode}"
        )
        gc.collect()
    assert peaks["full"] < peaks["selective"] < peaks["none"], peaks


def test_a_step_of_llama2_7b_in_bfloat16_fits_141_gb(gpu: WorkerEnv) -> None:
    peak = peak_of_a_step("model=llama2_7b", "optimizer=sgd", "precision=bf16", "seq_len=512", "trainer.batch_size=2")
    assert peak * GIB < 141e9, f"{peak:.1f} GiB"
    assert peak * GIB > 2 * 2 * 6.7e9, "weights and gradients were there"


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("loss", ["cross_entropy", "chunked_cross_entropy"])
@pytest.mark.parametrize("shared", ["false", "true"])
def test_a_step_that_is_not_logged_never_makes_the_host_wait(
    gpu: WorkerEnv, compiled: str, loss: str, shared: str
) -> None:
    config = compose_config(
        [
            "device=cuda",
            "tokenizer=byte",
            "trainer.max_steps=8",
            "precision=bf16",
            f"loss={loss}",
            f"compile={compiled}",
            f"trainer.share_prefixes={shared}",
        ]
    )
    model = build(config["model"]).replace(vocab_size=101)
    deal = partial(BatchLoader, Rows(80), shuffle=False, seed=0, pad_id=0)
    run = assemble_run(config, model, random_weights(0), deal, None, lambda *_: None, gpu)
    steps = remaining_steps(run)
    for _ in range(3):  # allocations and compilations wait
        train_step(run, next(steps))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            train_step(run, next(steps))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.state.guard.check()


def test_the_device_s_clock_agrees_with_the_wall_s(gpu: WorkerEnv) -> None:
    clock = PhaseClock(gpu.device)
    matrix = torch.randn(4096, 4096, device=gpu.device)
    clock.take()
    start = time.perf_counter()
    clock.enter("products")
    for _ in range(200):
        matrix @ matrix
    clock.enter("rest")
    seconds = clock.take()
    assert sum(seconds.values()) == pytest.approx(time.perf_counter() - start, rel=0.1)
    assert seconds["products"] > 0.8 * sum(seconds.values()), "queued in no time, and yet the device's time"
