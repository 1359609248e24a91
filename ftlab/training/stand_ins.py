"""Stand-ins for the parts of a run that cannot do without numbers, where tensors have shapes and no data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor

from ftlab.distributed.ddp import Replicas
from ftlab.distributed.single import OneRank
from ftlab.models.layers import RMSNorm
from ftlab.models.transformer import Transformer
from ftlab.training.update import only

_CPU = torch.device("cpu")


class WithoutData(FakeTensorMode):
    """Tensors with shapes and no data.

    Whatever the host reads of one is 1: Adafactor reads norms, and allocates the same for any.
    """

    def __init__(self) -> None:
        # No fallback: an operation that torch cannot do without data would quietly be done on real zeros.
        super().__init__(allow_non_fake_inputs=True, allow_fallback_kernels=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = func is torch.ops.aten._local_scalar_dense.default
        if reads and isinstance(args[0], FakeTensor) and args[0].constant is None:
            return 1.0 if args[0].is_floating_point() else 1
        return super().__torch_dispatch__(func, types, args, kwargs or {})


def without_data(model: Transformer) -> None:
    """Bring a model from meta to CPU tensors without data, and let ``place`` find nothing left to allocate."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=_CPU))
            setattr(module, name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=_CPU))
    to_empty: Any = lambda **_: model  # noqa: E731 -- a method of this one model
    model.to_empty = to_empty  # type: ignore[method-assign]


class BlindGuard:
    """In place of ``StepGuard``: numbers that are not there cannot be looked at.

    Of sharded parameters the optimizer gets this rank's rows as plain tensors, which is what its kernel works on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, shards: Mapping[Tensor, Tensor]):
        self._optimizer, self._scaler = optimizer, scaler
        self._sharded = [(whole, shard) for whole, shard in shards.items() if whole is not shard]

    def update(self, *_: Any) -> None:
        for whole, shard in self._sharded:
            assert whole.grad is not None
            shard.grad, whole.grad = local_rows(whole.grad), None
        self._optimizer.step()
        if self._scaler.is_enabled():
            self._scaler.update(1.0)


class BlindInBackward:
    """In place of ``InBackward``, for the same two reasons."""

    def __init__(self, optimizer: torch.optim.Optimizer, shards: Mapping[Tensor, Tensor]):
        self._optimizer, self._shards = optimizer, shards
        self._group_of = {shard: group for group in optimizer.param_groups for shard in group["params"]}
        for whole in shards:
            whole.register_post_accumulate_grad_hook(self._take)

    def backward(self, objective: Tensor) -> None:
        objective.backward()

    def _take(self, whole: Tensor) -> None:
        shard = self._shards[whole]
        assert whole.grad is not None
        gradient, whole.grad = local_rows(whole.grad), None
        shard.grad = gradient
        with only(self._optimizer, self._group_of[shard], shard):
            self._optimizer.step()
        shard.grad = None

    def apply(self, loss: Tensor, sample_ids: list[int]) -> Tensor:  # noqa: ARG002 -- every update's signature
        return loss


class Buckets(OneRank):
    """In place of ``Replicas``, whose buckets C++ makes from data: they are as large as the gradients, and stay."""

    def __init__(self, replicas: Replicas):
        super().__init__(_CPU, activation_checkpointing=replicas.activation_checkpointing)
        self.dp_size = replicas.dp_size

    def place(self, model: nn.Module) -> None:
        super().place(model)
        for parameter in model.parameters():
            bucket = torch.empty_like(parameter)

            def keep(parameter: Tensor, bucket: Tensor = bucket) -> None:
                parameter.grad = bucket

            parameter.register_post_accumulate_grad_hook(keep)


@contextmanager
def fused_norms() -> Iterator[None]:
    """Within it RMSNorms take what CUDA's kernel takes: a CPU has none, and keeps two float32 copies of each input."""
    plain = RMSNorm.forward

    def forward(norm: RMSNorm, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            x = x.float()  # autocast on CUDA does that, on a CPU not
        normed: Tensor = _FusedNorm.apply(x, norm.weight.to(x.dtype))
        return normed

    RMSNorm.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        RMSNorm.forward = plain  # type: ignore[method-assign]


class _FusedNorm(torch.autograd.Function):
    """``aten::_fused_rms_norm`` without numbers: it keeps its input, the gain and a scale for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *d_normed: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004 -- autograd's signature
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def local_rows(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor; of any other all."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
