"""A vocabulary that grows while its weights are read into shards: the same rows as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ftlab.assembly.model import build_model, weights_in
from ftlab.distributed.env import WorkerEnv
from ftlab.models.weights import load_weights
from tests.distributed.harness import run_ranks
from tests.distributed.strategies import in_group, precision_of, strategy, whole_weights
from tests.distributed.test_weights_in_shards import write_folder
from tests.loop.conftest import MODEL

STRATEGIES = {
    "ddp": strategy("ddp"),
    "fsdp": strategy("fsdp"),
    "hsdp": strategy("hsdp", replicate_degree=2),
    "cpu_offload": strategy("fsdp", cpu_offload=True),
}


def grown(worker: WorkerEnv, folder: Path, tied: bool, new_ids: range) -> dict[str, Any]:
    """Whole weights of ``MODEL`` grown to hold ``new_ids``, by strategy."""
    config = MODEL.replace(vocab_size=new_ids.stop, tie_embeddings=tied)
    results = {}
    for name, parallelism in STRATEGIES.items():
        parallel = parallelism.start(in_group(worker, name), precision_of("fp32"))
        model = build_model(config, weights_in(folder, new_ids), precision_of("fp32"), parallel)
        results[name] = whole_weights(model)
        parallel.close()
    return results


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_rows_are_those_of_one_process_bitwise(tied: bool, tmp_path: Path) -> None:
    new_ids = range(101, 117)  # over two ranks: shards of 59 and 58 rows, the new ones in the second
    folder = write_folder(MODEL.replace(tie_embeddings=tied), tmp_path / "weights", seed=3)
    whole = MODEL.replace(vocab_size=new_ids.stop, tie_embeddings=tied).build()
    load_weights(whole, folder, new_ids)
    result, *_ = run_ranks(2, grown, folder, tied, new_ids)
    for name, weights in result.items():
        for key, parameter in whole.named_parameters():
            assert torch.equal(weights[key], parameter), f"{name}: {key}"
