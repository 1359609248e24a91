"""A model in place: its vocabulary as large as the tokenizer's, its weights drawn, loaded or restored."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ftlab.data.tokenizers import Tokenizer
from ftlab.distributed.base import Parallelism
from ftlab.distributed.precision import Precision
from ftlab.errors import ConfigError
from ftlab.models.auto import AnyModel, AnyModelConfig
from ftlab.models.cpu_products import speed_up_products
from ftlab.models.resize import compare_specials, fit_vocabulary
from ftlab.models.transformer import Transformer
from ftlab.models.weights import load_weights
from ftlab.training.opened import Opened
from ftlab.training.snapshot import restore_weights

Fill = Callable[[AnyModel], None]
log = logging.getLogger(__name__)


def with_vocabulary(
    model: AnyModelConfig, folder: Path | None, tokenizer: Tokenizer, opened: Opened | None = None
) -> AnyModelConfig:
    """``model`` with rows for all of the tokenizer's ids; pretrained weights must be of that tokenizer.

    Args:
        folder: of pretrained weights.
        opened: a checkpoint instead, which has the rows that it has.
    """
    if opened is not None and (n_rows := opened.vocab_size) is not None:
        if n_rows < tokenizer.vocab_size:
            problem = f"it has {tokenizer.vocab_size} tokens, but {opened.path} has rows for {n_rows}"
            raise ConfigError("tokenizer", problem, "the tokenizer that the checkpoint was trained with")
        return replace(model, vocab_size=n_rows)
    fitting = fit_vocabulary(model, folder, tokenizer.vocab_size, tokenizer.new_ids)
    if folder is not None:
        for warning in compare_specials(folder, tokenizer.bos_id, tokenizer.eos_id):
            log.warning("tokenizer: %s", warning)
        if new_ids := tokenizer.new_ids:
            new = f"{len(new_ids)} new tokens, ids {new_ids.start} to {new_ids.stop - 1}"
            log.info("vocabulary: %s: their rows begin as the mean of the others", new)
    return fitting


def random_weights(seed: int) -> Fill:
    """Draws them."""

    def draw(model: AnyModel) -> None:
        assert isinstance(model, Transformer)  # others are nothing without a checkpoint
        model.init_weights(seed)

    return draw


def weights_in(folder: Path, new_ids: range = range(0)) -> Fill:
    """Loads pretrained ones, with rows for ``new_ids`` that the vocabulary did not have."""
    return lambda model: load_weights(model, folder, new_ids)


def weights_of(opened: Opened) -> Fill:
    """Loads those of a checkpoint of ours."""
    return lambda model: restore_weights(model, opened.stored, opened.told, opened.path)


def build_model(config: AnyModelConfig, fill: Fill, precision: Precision, parallel: Parallelism) -> AnyModel:
    """The model on its device with its weights in place: built on meta, so that nothing is ever held twice.

    Args:
        fill: gives the freshly allocated parameters their values.
    """
    if parallel.device.type == "cpu":
        speed_up_products(precision.compute)
    with torch.device("meta"):
        model = config.build().to(precision.weights)
    precision.prepare(model)
    parallel.place(model)
    fill(model)
    return model
