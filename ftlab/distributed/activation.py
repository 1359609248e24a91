"""Activation checkpointing: what a block computed on the way forward is computed again on the way back."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

_aten = torch.ops.aten
_MATMUL = _aten.mm.default
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


def checkpoint_activations(model: nn.Module, mode: str) -> None:
    """Make each of ``model.blocks`` keep less of its forward than backward needs, and recompute the rest.

    The block's ``forward`` is replaced on the instance: names of parameters and the class stay, and the
    recomputation runs inside whatever ``fully_shard`` hangs around the block, while its weights are gathered.

    Args:
        mode: ``none`` keeps everything, ``full`` keeps the input of the block only, ``selective`` also
            the output of attention and of every second matrix product.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block is random
    if mode == "selective":
        options["context_fn"] = _selective_contexts
    for block in model.get_submodule("blocks").children():
        block.forward = partial(checkpoint, block.forward, **options)


def _selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    n_matmuls: Counter[bool] = Counter()  # forward and recomputation go through the same sequence, each counted apart

    def policy(context: SelectiveCheckpointContext, op: OpOverload, *_: Any, **__: Any) -> CheckpointPolicy:
        keep = op in _ATTENTION
        if op == _MATMUL:
            n_matmuls[context.is_recompute] += 1
            # The second, fourth, ...: in a Llama block k, o and up. Its seventh, the last, is never needed again.
            keep = n_matmuls[context.is_recompute] % 2 == 0
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
