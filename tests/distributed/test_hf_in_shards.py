"""``model=hf`` in many ranks against one: the same losses and weights, and a folder that transformers opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftlab.distributed.env import WorkerEnv
from ftlab.models.auto import find_model
from ftlab.models.hf import HFModel
from ftlab.models.weights import export_weights
from ftlab.training.loop import fit
from tests.distributed.harness import run_ranks
from tests.distributed.strategies import in_group, precision_of, strategy
from tests.loop.conftest import Rows, build_hand_run
from tests.unit.test_hf import KINDS, saved

ROWS = Rows(25)
STEPS, GLOBAL_BATCH = 20, 8
ALONE = WorkerEnv(rank=0, local_rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp": ("fsdp", {}),
    "fsdp recomputed": ("fsdp", {"activation_checkpointing": "full"}),
    "ddp": ("ddp", {}),
}


def train(worker: WorkerEnv, name: str, folder: Path, to: Path, precision: str) -> list[float]:
    """Train the checkpoint in ``folder`` under the case ``name``, export it; losses of every step."""
    kind, changes = CASES.get(name, ("single", {}))
    config, checkpoint = find_model(HFModel(checkpoint=str(folder)))
    parallel = strategy(kind, **changes).start(in_group(worker, name), precision_of(precision))
    trial = build_hand_run(
        ROWS, parallel=parallel, batch_size=GLOBAL_BATCH // worker.world_size, max_steps=STEPS, lr=0.05,
        model_config=config, checkpoint=checkpoint, precision=precision,
    )  # fmt: skip
    fit(trial.run)
    export_weights(trial.run.state.model, to / name, dtype=torch.float32, bos_id=1, eos_id=2, pad_id=None)
    parallel.close()
    return trial.losses


def train_all(worker: WorkerEnv, folder: Path, to: Path, precision: str) -> dict[str, list[float]]:
    return {name: train(worker, name, folder, to, precision) for name in CASES}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
def test_twenty_steps_on_two_ranks_are_those_of_one(kind: str, precision: str, tmp_path: Path) -> None:
    saved(kind, tmp_path / "start", vocab_size=101)
    alone = train(ALONE, "single", tmp_path / "start", tmp_path, precision)
    assert alone[-1] < 0.95 * alone[0], "nothing was learnt"
    [together, _] = run_ranks(2, train_all, tmp_path / "start", tmp_path, precision)
    rtol = 1e-5 if precision == "fp32" else 2e-2
    for name in CASES:
        assert together[name] == pytest.approx(alone, rel=rtol), name
    if precision == "fp32":
        for name in CASES:
            ours, theirs = (load_file(tmp_path / case / "model.safetensors") for case in (name, "single"))
            for tensor, weight in theirs.items():
                torch.testing.assert_close(ours[tensor], weight, rtol=1e-4, atol=1e-5, msg=f"{name}: {tensor}")
