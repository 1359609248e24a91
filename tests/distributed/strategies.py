"""The options of conf/parallelism as tests use them, and one training run of a rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ftlab.distributed.base import Strategy
from ftlab.distributed.ddp import DDP
from ftlab.distributed.env import WorkerEnv
from ftlab.distributed.fsdp import FSDP, HSDP
from ftlab.distributed.single import Single
from ftlab.models.shards import all_rows
from ftlab.models.transformer import Transformer
from ftlab.training.loop import fit
from tests.loop.conftest import Rows, build_hand_run, precision_of

WORKERS = {"nproc_per_node": None, "nnodes": 1, "rdzv_endpoint": None, "timeout_s": 30, "max_restarts": 0}
SHARDED = WORKERS | {"activation_checkpointing": "none", "cpu_offload": False, "reshard_after_forward": True}


def strategy(name: str, **changes: Any) -> Strategy:
    """``parallelism=name`` with its default values but for ``changes``."""
    match name:
        case "single":
            return Single(**{"activation_checkpointing": "none"} | changes)
        case "ddp":
            return DDP(**WORKERS | {"activation_checkpointing": "none"} | changes)
        case "fsdp":
            return FSDP(**SHARDED | changes)
        case "hsdp":
            return HSDP(**SHARDED | {"replicate_degree": None, "shard_degree": None} | changes)
    raise ValueError(name)


def in_group(worker: WorkerEnv, name: str) -> WorkerEnv:
    """``worker`` with a store of its own in the ranks' common one, for several process groups one after the other."""
    return worker if worker.store is None else replace(worker, store=dist.PrefixStore(name, worker.store))


@dataclass(frozen=True)
class Trained:
    """What a rank saw of a run; the weights are rank 0's to know."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]


def train(worker: WorkerEnv, parallelism: Strategy, rows: Rows, precision: str = "fp32", **options: Any) -> Trained:
    """Train one rank of ``parallelism``."""
    parallel = parallelism.start(worker, precision_of(precision))
    trial = build_hand_run(rows, parallel=parallel, precision=precision, **options)
    fit(trial.run)
    weights = whole_weights(trial.run.state.model)
    parallel.close()
    return Trained(trial.losses, [line["train/grad_norm"] for line in trial.lines], weights)


def whole_weights(model: Transformer) -> dict[str, Tensor]:
    """Every parameter whole on rank 0, empty elsewhere; a collective."""
    gathered = {name: list(all_rows(parameter)) for name, parameter in model.named_parameters()}
    return {name: torch.cat(pieces) for name, pieces in gathered.items() if pieces}
