"""Many ranks against one: the same losses, gradients, clipping and weights, whichever way the model is divided."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from ftlab.distributed.env import WorkerEnv
from ftlab.training.loop import fit
from tests.distributed.harness import run_ranks
from tests.distributed.strategies import Trained, in_group, strategy, train
from tests.loop.conftest import Rows, WeightedRows, build_hand_run, precision_of

# 25 rows in batches of 8: the last batch of each epoch has one row, so that all ranks but one have none.
ROWS, WEIGHTED = Rows(25), WeightedRows(25)
GLOBAL_BATCH, STEPS, TOLERANCE = 8, 20, 1e-5
ALONE = WorkerEnv(rank=0, local_rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
OPTIMIZERS = {"sgd": (torch.optim.SGD, 0.3), "adamw": (torch.optim.AdamW, 2e-3)}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "ddp": ("ddp", {}, 1),
    "ddp, accumulation": ("ddp", {}, 2),
    "ddp, weighted rows, accumulation": ("ddp", {}, 2),
    "fsdp, weighted rows": ("fsdp", {}, 1),
    "ddp, shared prefixes, accumulation": ("ddp", {}, 2),
    "fsdp, shared prefixes, weighted rows": ("fsdp", {"activation_checkpointing": "selective"}, 1),
    "fsdp": ("fsdp", {}, 1),
    "fsdp, weights kept until backward": ("fsdp", {"reshard_after_forward": False}, 1),
    "fsdp, full activation checkpointing": ("fsdp", {"activation_checkpointing": "full"}, 1),
    "fsdp, selective activation checkpointing": ("fsdp", {"activation_checkpointing": "selective"}, 1),
    "fsdp, CPU offload": ("fsdp", {"cpu_offload": True}, 1),
    "fsdp, accumulation": ("fsdp", {}, 2),
    "hsdp": ("hsdp", {"replicate_degree": 2}, 1),
    "hsdp, accumulation": ("hsdp", {"replicate_degree": 2}, 2),
}


def cases_for(n_ranks: int) -> dict[str, tuple[str, dict[str, Any], int]]:
    """All but those that need more ranks."""
    return {name: case for name, case in CASES.items() if n_ranks >= case[1].get("replicate_degree", 1)}


def options(optimizer: str, max_grad_norm: float | None = 1.0) -> dict[str, Any]:
    kind, lr = OPTIMIZERS[optimizer]
    return {"optimizer": kind, "lr": lr, "max_steps": STEPS, "max_grad_norm": max_grad_norm}


def rows_of(case: str) -> Rows:
    return WEIGHTED if "weighted rows" in case else ROWS


@cache
def reference(optimizer: str, rows: Rows) -> Trained:
    return train(ALONE, strategy("single"), rows, batch_size=GLOBAL_BATCH, **options(optimizer))


def train_all(
    worker: WorkerEnv, cases: dict[str, tuple[str, dict[str, Any], int]], optimizer: str
) -> dict[str, Trained]:
    """Every case in one set of processes, one process group after the other."""
    results = {}
    for name, (kind, changes, accumulation) in cases.items():
        batch_size = GLOBAL_BATCH // worker.world_size // accumulation
        results[name] = train(
            in_group(worker, name),
            strategy(kind, **changes),
            rows_of(name),
            batch_size=batch_size,
            accumulation=accumulation,
            share_prefixes="shared prefixes" in name,
            **options(optimizer),
        )
    return results


@cache
def trained(n_ranks: int, optimizer: str) -> list[dict[str, Trained]]:
    return run_ranks(n_ranks, train_all, cases_for(n_ranks), optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("n_ranks", "case"), [(n, case) for n in (1, 2, 4) for case in cases_for(n)])
def test_twenty_steps_equal_those_of_a_single_process(n_ranks: int, case: str, optimizer: str) -> None:
    expected, ranks = reference(optimizer, rows_of(case)), [rank[case] for rank in trained(n_ranks, optimizer)]
    assert expected.losses[0] - expected.losses[-1] > 0.1, "the comparison means nothing while nothing is learned"
    assert max(expected.grad_norms) > 1.0, "nor while nothing is clipped"
    for rank in ranks:
        assert rank.losses == pytest.approx(expected.losses, rel=TOLERANCE)
        assert rank.grad_norms == pytest.approx(expected.grad_norms, rel=TOLERANCE)
    for name, weight in expected.weights.items():
        deviation = (ranks[0].weights[name] - weight).norm() / weight.norm()
        assert deviation <= TOLERANCE, f"{name}: {deviation:.1e}"


# ------------------------------------------------------------------------------------------ mixed precision


def dtypes_and_losses(worker: WorkerEnv, precision: str) -> dict[str, Any]:
    """What FSDP computes in which dtype, seen from inside a block's forward, and 40 losses."""
    parallel = strategy("fsdp").start(worker, precision_of(precision))
    trial = build_hand_run(
        Rows(200), parallel=parallel, precision=precision, lr=0.3, batch_size=4 // worker.world_size, max_steps=40
    )
    model, seen = trial.run.state.model, {}

    def look(block: Any, arguments: tuple[Any, ...]) -> None:
        seen["gathered block"] = block.ffn.up_proj.weight.dtype
        seen["gathered embedding"] = model.embedding.weight.dtype
        seen["residual stream"] = arguments[0].dtype

    model.blocks[1].register_forward_pre_hook(look)
    fit(trial.run)
    seen["shards"] = model.blocks[0].ffn.up_proj.weight.dtype
    parallel.close()
    return seen | {"losses": trial.losses}


@pytest.mark.parametrize(("precision", "compute"), [("bf16_mixed", torch.bfloat16), ("fp16_mixed", torch.float16)])
def test_mixed_precision_gathers_blocks_in_the_compute_dtype_and_learns_as_in_float32(
    precision: str, compute: torch.dtype
) -> None:
    exact = train(ALONE, strategy("single"), Rows(200), "fp32", lr=0.3, batch_size=4, max_steps=40)
    for rank in run_ranks(2, dtypes_and_losses, precision):
        assert rank.pop("losses") == pytest.approx(exact.losses, rel=0.02)
        assert rank == {
            "gathered block": compute,
            "gathered embedding": torch.float32,
            "residual stream": torch.float32,
            "shards": torch.float32,
        }


def in_backward(worker: WorkerEnv) -> dict[str, bool]:
    """Whether an optimizer in the backward ends with the bits of the plain loop, by optimizer."""
    same = {}
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        ends = []
        for choice in (False, True):
            settings = {"optimizer": optimizer, "lr": 0.01, "max_grad_norm": None, "optimizer_in_backward": choice}
            env = in_group(worker, f"{optimizer.__name__}{choice}")
            ends.append(train(env, strategy("fsdp"), Rows(16), batch_size=4, max_steps=4, **settings))
        plain, within = ends
        same[optimizer.__name__] = (
            plain.losses == within.losses
            and plain.grad_norms == within.grad_norms
            and all(torch.equal(weight, within.weights[name]) for name, weight in plain.weights.items())
        )
    return same


def test_an_optimizer_in_the_backward_of_shards_gives_the_bits_of_the_plain_loop() -> None:
    assert run_ranks(2, in_backward) == [{"SGD": True, "AdamW": True}] * 2
