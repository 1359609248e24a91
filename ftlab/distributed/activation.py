"""Activation checkpointing: what a block computed on the way forward is computed again on the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ftlab.errors import ConfigError

_aten = torch.ops.aten
_MATMULS = frozenset({_aten.mm.default, _aten._scaled_mm.default})  # the second is float8's
# Whichever kernel scaled_dot_product_attention chose. The most expensive thing to repeat, and O(T) to keep.
_ATTENTION = frozenset(
    {
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_fused_attention_overrideable.default,
    }
)
# Of packed rows: on a CPU, and on CUDA in compiled blocks; in others flex attention is nothing that can be kept.
_ATTENTION_BY_DOCUMENT = frozenset({"ftlab::attend_by_document", "flex_attention"})


def checkpoint_activations(model: nn.Module, mode: str) -> None:
    """Make each of ``model.blocks`` keep less of its forward than backward needs, and recompute the rest.

    The block's ``forward`` is replaced on the instance: names of parameters and the class stay, and the
    recomputation runs inside whatever ``fully_shard`` hangs around the block, while its weights are gathered.

    Args:
        mode: ``none`` keeps everything, ``full`` keeps the input of the block only, ``selective`` also
            the output of attention and of every second matrix product; ``offload`` is ``full`` with the inputs
            kept in the host's memory.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block is random
    if mode == "selective":
        options["context_fn"] = _selective_contexts
    for block in model.get_submodule("blocks").children():
        block.forward = partial(checkpoint, block.forward, **options)
        if mode == "offload":
            block.forward = partial(_keeping_on_host, block.forward)


def require_a_gpu(mode: str, device: torch.device) -> None:
    """Refuse ``offload`` where there is nowhere to move activations to.

    Raises:
        ConfigError: on a CPU.
    """
    if mode == "offload" and device.type == "cpu":
        problem = "offload, but on a CPU activations are in the host's memory already"
        raise ConfigError("parallelism.activation_checkpointing", problem, "parallelism.activation_checkpointing=full")


def _keeping_on_host(forward: Callable[..., Tensor], *arguments: Any, **named: Any) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(_to_host, _to_device):
        return forward(*arguments, **named)


# What is saved, where it is now, where it belongs; None is nowhere: a rehearsal counts the device's memory only.
_Kept = tuple[torch.Size, torch.dtype, torch.device, Tensor | None]


def _to_host(tensor: Tensor) -> _Kept:
    """Copy ``tensor`` while the device goes on computing: a copy on a stream of its own, into pinned memory."""
    about = tensor.shape, tensor.dtype, tensor.device
    if isinstance(tensor, FakeTensor):
        return *about, None
    if not tensor.is_cuda:
        return *about, tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    stream = _copies(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)  # its memory is used again only once it has been copied
    return *about, host


def _to_device(kept: _Kept) -> Tensor:
    shape, dtype, device, host = kept
    if host is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_copies(device))
    return host.to(device, non_blocking=True)


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    n_matmuls: Counter[bool] = Counter()  # forward and recomputation go through the same sequence, each counted apart

    def policy(context: SelectiveCheckpointContext, op: OpOverload, *_: Any, **__: Any) -> CheckpointPolicy:
        keep = op in _ATTENTION or op.name() in _ATTENTION_BY_DOCUMENT
        if op in _MATMULS:
            n_matmuls[context.is_recompute] += 1
            # The second, fourth, ...: in a Llama block k, o and up. Its seventh, the last, is never needed again.
            keep = n_matmuls[context.is_recompute] % 2 == 0
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
