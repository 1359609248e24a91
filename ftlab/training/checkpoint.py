"""What is kept of a run's weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ftlab.data.tokenizers import Tokenizer
from ftlab.models.auto import AnyModel
from ftlab.models.shards import this_rank
from ftlab.models.weights import export_weights


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """``conf/checkpoint/default.yaml`` explains each key."""

    export: bool


def export_model(model: AnyModel, tokenizer: Tokenizer, folder: Path, *, dtype: torch.dtype) -> Path:
    """Write model and tokenizer as one Hugging Face folder, complete for transformers and vLLM; returns the folder.

    Every rank must call it; rank 0 writes.
    """
    if this_rank() == 0:  # before the weights, whose config.json makes the folder complete
        tokenizer.save(folder)
    export_weights(model, folder, dtype=dtype, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=None)
    return folder
