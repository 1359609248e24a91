"""Every rank holds a share of each parameter, gradient and optimizer state (FSDP2, ``fully_shard``)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ftlab.distributed.activation import checkpoint_activations
from ftlab.distributed.base import Parallelism, Workers
from ftlab.distributed.env import WorkerEnv
from ftlab.distributed.fused_sgd import teach_dtensor_fused_sgd
from ftlab.distributed.precision import Precision
from ftlab.distributed.ranks import Ranks, join
from ftlab.distributed.single import OneRank
from ftlab.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FSDP(Workers):
    """``parallelism=fsdp``: each block's weights are gathered for its forward and backward only.

    Args:
        activation_checkpointing: none, full or selective; see ``activation.py``.
        cpu_offload: keep the shares in the host's memory and run the optimizer there.
        reshard_after_forward: give a block's weights back between its forward and backward, and gather them
            twice a step; false keeps them, for memory of the whole model in the compute dtype.
    """

    activation_checkpointing: str
    cpu_offload: bool
    reshard_after_forward: bool

    def start(self, worker: WorkerEnv, precision: Precision) -> Parallelism:
        if worker.world_size == 1 and not self.cpu_offload:
            # Nothing to share with: fully_shard would only copy every weight before each use.
            return OneRank(worker.device, activation_checkpointing=self.activation_checkpointing)
        join(worker, self.timeout_s)
        return Shards(self, worker, precision, init_device_mesh(worker.device.type, (worker.world_size,)))


@dataclass(frozen=True, kw_only=True)
class HSDP(FSDP):
    """``parallelism=hsdp``: sharded within groups of ranks, replicated across them.

    Weights travel within a group only, which is best a machine; between groups only sums of gradients do.

    Args:
        replicate_degree: groups; null: as many as ``shard_degree`` leaves.
        shard_degree: ranks in a group; null: as many as ``replicate_degree`` leaves. Both null: a machine's.
    """

    replicate_degree: int | None
    shard_degree: int | None

    def start(self, worker: WorkerEnv, precision: Precision) -> Parallelism:
        shape = self.mesh_shape(worker.world_size, worker.local_world_size)
        if worker.world_size == 1 and not self.cpu_offload:
            return OneRank(worker.device, activation_checkpointing=self.activation_checkpointing)
        join(worker, self.timeout_s)
        ranks = torch.arange(worker.world_size).view(shape)
        # By hand: groups that init_device_mesh makes have torch's timeout, not ours.
        timeout = timedelta(seconds=self.timeout_s)
        replicate, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=timeout)
        shard, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)
        assert replicate is not None
        assert shard is not None
        mesh = DeviceMesh.from_group(
            [replicate, shard], worker.device.type, mesh=ranks, mesh_dim_names=("replicate", "shard")
        )
        return Shards(self, worker, precision, mesh)

    def one_group(self) -> FSDP:
        """How the ranks of one group share the model, as if there were no other groups."""
        return FSDP(**{field.name: getattr(self, field.name) for field in fields(FSDP)})

    def mesh_shape(self, n_ranks: int, n_local_ranks: int) -> tuple[int, int]:
        """(groups, ranks in a group).

        Raises:
            ConfigError: where their product is not the number of ranks.
        """
        replicate, shard = self.replicate_degree, self.shard_degree
        if shard is None:
            shard = n_local_ranks if replicate is None else n_ranks // replicate
        if replicate is None:
            replicate = n_ranks // shard
        if replicate * shard != n_ranks:
            raise ConfigError(
                "parallelism.replicate_degree",
                f"replicate_degree × shard_degree = {replicate} × {shard} = {replicate * shard}, "
                f"but there are {n_ranks} ranks",
                fix=f"parallelism.replicate_degree=1 parallelism.shard_degree={n_ranks}",
            )
        return replicate, shard


class Shards(Ranks):
    """A ``Parallelism`` of ranks that hold shards: dim 0 of every parameter is divided over the mesh's last axis.

    Precision: autocast decides what is computed in which dtype, as under every other strategy. The weights of
    blocks are gathered in the compute dtype already, since autocast would cast matrices to it in any case: that
    halves the bytes on the wire and the memory of gathered weights. Only the gains of norms, which autocast leaves
    alone, are rounded by it: what training adds to one, and is there in float32, shows in the forward once it is half
    a step of the compute dtype, as under every FSDP with mixed precision. Embedding and head are gathered as they
    are, so that the residual stream keeps the dtype it has on one device. Gradients are summed over ranks in float32.

    Gradients are exchanged after every backward, also within accumulation: kept back they would be as large as
    the whole model in float32 on each rank. Only the sum between the groups of HSDP waits for the last.
    """

    def __init__(self, settings: FSDP, worker: WorkerEnv, precision: Precision, mesh: DeviceMesh):
        super().__init__(worker)
        self._settings, self._precision, self._mesh = settings, precision, mesh
        self._sharded_over = mesh.size(mesh.ndim - 1)
        teach_dtensor_fused_sgd()

    def place(self, model: nn.Module) -> None:
        settings, precision = self._settings, self._precision
        checkpoint_activations(model, settings.activation_checkpointing)
        mixed = precision.compute if precision.compute != precision.weights else None
        on_gpu = self.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=on_gpu) if settings.cpu_offload else OffloadPolicy()
        shared: dict[str, Any] = {"mesh": self._mesh, "offload_policy": offload}
        for block in model.get_submodule("blocks").children():
            fully_shard(
                block,
                # Among one rank nothing is freed by giving the weights back, and copying them again costs time.
                reshard_after_forward=settings.reshard_after_forward and self._sharded_over > 1,
                mp_policy=MixedPrecisionPolicy(
                    param_dtype=mixed, reduce_dtype=torch.float32, cast_forward_inputs=False
                ),
                **shared,
            )
        # Embedding, last norm and head: backward begins with what forward ended with, so they stay in between.
        mp_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(model, reshard_after_forward=False, mp_policy=mp_policy, **shared)
        model.register_forward_hook(_reshard_without_backward)
        model.to_empty(device="cpu" if settings.cpu_offload else self.device)
        for module in model.modules():  # buffers: computed with on the device, wherever the shards are
            if next(module.parameters(), None) is None:
                module.to(self.device)

    def sync_gradients(self, model: nn.Module, *, enabled: bool) -> None:
        assert isinstance(model, FSDPModule)
        model.set_requires_all_reduce(enabled)

    def clip_grad_norm_(self, model: nn.Module, max_norm: float | None) -> Tensor:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        assert isinstance(norm, DTensor)
        norm = norm.full_tensor()  # of shards: until here every rank has the norm of its own
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        return norm.to(self.device)  # from the host, with CPU offload


def _reshard_without_backward(model: nn.Module, *_: Any) -> None:
    """After a forward that no backward follows (evaluation), what that backward would have freed is freed here.

    So outside of a step parameters are always shards: what is saved or exported is never a gathered copy.
    """
    if not torch.is_grad_enabled():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
