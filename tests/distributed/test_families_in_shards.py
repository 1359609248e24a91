"""Every family in two ranks against one: biases, heads' gains, windows and stretched waves shard like the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ftlab.distributed.env import WorkerEnv
from ftlab.models.rotary import Llama3RopeScaling
from ftlab.training.loop import fit
from tests.distributed.harness import run_ranks
from tests.distributed.strategies import in_group, precision_of, strategy, whole_weights
from tests.loop.conftest import MODEL, Rows, build_hand_run

ALONE = WorkerEnv(rank=0, local_rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
SCALING = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": SCALING, "tie_embeddings": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"head_dim": 20},
}
CASES = {"fsdp": {}, "fsdp recomputed": {"activation_checkpointing": "selective"}}


def train(worker: WorkerEnv, family: str, case: str, precision: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    parallelism = strategy("fsdp", **CASES[case]) if case in CASES else strategy("single")
    parallel = parallelism.start(in_group(worker, f"{family} {case} {precision}"), precision_of(precision))
    trial = build_hand_run(
        Rows(25), parallel=parallel, batch_size=8 // worker.world_size, max_steps=10, precision=precision,
        model_config=MODEL.replace(family=family, **FAMILIES[family]),
    )  # fmt: skip
    fit(trial.run)
    weights = whole_weights(trial.run.state.model)
    parallel.close()
    return trial.losses, weights


def train_all(worker: WorkerEnv, precision: str) -> dict[tuple[str, str], Any]:
    return {(family, case): train(worker, family, case, precision) for family in FAMILIES for case in CASES}


@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
def test_ten_steps_on_two_ranks_are_those_of_one(precision: str) -> None:
    [together, _] = run_ranks(2, train_all, precision)
    for family in FAMILIES:
        losses, weights = train(ALONE, family, "single", precision)
        for case in CASES:
            ours, sharded = together[family, case]
            assert ours == pytest.approx(losses, rel=1e-5 if precision == "fp32" else 2e-2), f"{family}, {case}"
            if precision == "fp32":
                for name, weight in weights.items():
                    torch.testing.assert_close(sharded[name], weight, rtol=1e-4, atol=1e-5, msg=f"{family}: {name}")
