"""Sizes that no test machine has: Llama-2-7B over eight ranks that exist in name only, on meta."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ftlab.config.build import build
from ftlab.config.check import compose_config
from ftlab.distributed.env import WorkerEnv
from ftlab.distributed.fsdp import FSDP, Shards


@pytest.fixture
def worker_of_eight():
    dist.init_process_group("fake", rank=3, world_size=8, store=FakeStore())
    yield WorkerEnv(rank=3, local_rank=3, world_size=8, local_world_size=8, device=torch.device("meta"))
    dist.destroy_process_group()


def test_llama2_7b_over_eight_ranks_has_no_parameter_that_is_not_sharded(worker_of_eight) -> None:
    config = compose_config(["model=llama2_7b", "model.checkpoint=null", "tokenizer=byte", "parallelism=fsdp"])
    settings, precision, model_config = (build(config[group]) for group in ("parallelism", "precision", "model"))
    assert isinstance(settings, FSDP)
    with torch.device("meta"):
        model = model_config.replace(vocab_size=32000).build()
    Shards(settings, worker_of_eight, precision, init_device_mesh("cpu", (8,))).place(model)
    parameters = list(model.parameters())
    assert all(isinstance(p, DTensor) and list(p.placements) == [Shard(0)] for p in parameters)
    assert sum(p.to_local().numel() for p in parameters) == sum(p.numel() for p in parameters) // 8
    assert all(isinstance(block, FSDPModule) for block in model.blocks), "gathered block by block"
