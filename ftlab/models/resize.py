"""Where tokenizer and model meet: do the ids have rows, and which rows do new tokens begin with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ftlab.errors import ConfigError
from ftlab.models.config import ModelConfig
from ftlab.models.hf import HFModelConfig
from ftlab.models.layouts import Layout, described_sizes
from ftlab.models.stored import StoredTensor, read_json_object

_Config = TypeVar("_Config", bound="ModelConfig | HFModelConfig")

_OF_THE_VOCABULARY = ("embedding.weight", "head.weight")
# Models have a few rows more than their tokenizer has ids, to make the number round: Qwen2.5 0.3 %, Phi-2 1.8 %.
_LEAST_SHARE_OF_ROWS = 0.9
_ROWS_AT_A_TIME = 4096


def fit_vocabulary(model: _Config, folder: Path | None, n_ids: int, new_ids: range) -> _Config:
    """``model`` with as many rows as ``n_ids`` need.

    Random weights take the tokenizer's size, or a larger one that the configuration names. Pretrained ones keep their
    rows, of which they may have some more than there are ids, and get further ones for ``new_ids`` only.

    Args:
        folder: of the pretrained weights; None for random ones.
        n_ids: the tokenizer's, ``new_ids`` included.

    Raises:
        ConfigError: for a tokenizer of another model's size, or a vocabulary that has no room for it.
    """
    n_known = n_ids - len(new_ids)
    if folder is None:
        n_rows = model.vocab_size or n_known
        if n_rows < n_known:
            raise ConfigError(
                "model.vocab_size",
                f"{n_rows} is fewer than the {n_known} tokens of the tokenizer",
                "model.vocab_size=null, which takes the tokenizer's",
            )
        return replace(model, vocab_size=max(n_rows, n_ids))
    n_rows = model.vocab_size or described_sizes(folder)[1].get("vocab_size") or n_ids
    if not _LEAST_SHARE_OF_ROWS * n_rows <= n_known <= n_rows:
        raise ConfigError(
            "tokenizer",
            f"it has {n_known} tokens, but the model of {model.checkpoint} has {n_rows}",
            "the tokenizer the model was trained with: tokenizer.path=/path/to/the/model/folder",
        )
    return replace(model, vocab_size=max(n_rows, n_ids))


def compare_specials(folder: Path, bos_id: int | None, eos_id: int) -> list[str]:
    """What to warn of: a BOS or EOS that is not the one in the folder's config.json or generation_config.json.

    Instruction-tuned models often end an answer with another token than their config.json says, so one difference
    is not an error. BOS and EOS both different is the tokenizer of another model.

    Raises:
        ConfigError: if both differ, with the numbers.
    """
    differing = []
    for name, ours in (("bos", bos_id), ("eos", eos_id)):
        theirs = sorted(set(_described_ids(folder, f"{name}_token_id")))
        if theirs and ours is not None and ours not in theirs:
            said = " or ".join(map(str, theirs))
            differing.append(f"{name} is {ours} in the tokenizer, but {said} in the config.json of {folder}")
    if len(differing) == 2:
        raise ConfigError(
            "tokenizer",
            "; ".join(differing),
            "the tokenizer the model was trained with: tokenizer.path=/path/to/the/model/folder",
        )
    return differing


def end_ids(folder: Path | None, eos_id: int) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS, then the others that the weights' own files name.

    Instruction-tuned models list several (Llama 3: ``<|eot_id|>``, ``<|eom_id|>``, ``<|end_of_text|>``), and may use
    any. generation_config.json decides, as it does for transformers; config.json where that names none.

    Args:
        folder: of the weights; None for random ones.
    """
    named: list[int] = []
    for file in ("generation_config.json", "config.json"):
        named = named or (list(_ids_in(folder / file, "eos_token_id")) if folder is not None else [])
    return list(dict.fromkeys([eos_id, *named]))


def _described_ids(folder: Path, key: str) -> Iterator[int]:
    for name in ("config.json", "generation_config.json"):
        yield from _ids_in(folder / name, key)


def _ids_in(file: Path, key: str) -> Iterator[int]:
    if file.is_file():
        value = read_json_object(file).get(key)
        yield from value if isinstance(value, list) else [] if value is None else [value]


def with_new_rows(layout: Layout, new_ids: range, n_rows: int) -> Layout:
    """``layout`` as if its embedding and head had ``n_rows``, those of ``new_ids`` being the mean of all before them.

    The mean of the known tokens gives a new one an average probability, so it neither takes over nor has to be
    found (Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html). Rows are made when they are read, so that
    a rank gets those of its shard like any others. Rows that padded a vocabulary hold nothing learnt: ids that come
    to lie there get the mean too.

    Args:
        new_ids: all ids before them are known.
        n_rows: of the model; ``new_ids.stop`` or more.
    """
    named = [layout.names[name] for name in _OF_THE_VOCABULARY if name in layout.names]
    grown = {name: _grown(layout.tensors[name], new_ids, n_rows) for name in named if name in layout.tensors}
    return replace(layout, tensors=layout.tensors | grown)


def _grown(stored: StoredTensor, new_ids: range, n_rows: int) -> StoredTensor:
    @cache
    def mean() -> Tensor:
        total = torch.zeros(stored.shape[1:], dtype=torch.float64)
        for start in range(0, new_ids.start, _ROWS_AT_A_TIME):
            total += stored.read(slice(start, min(start + _ROWS_AT_A_TIME, new_ids.start))).double().sum(dim=0)
        return (total / new_ids.start).float()

    def read(rows: slice) -> Tensor:
        start, stop, _ = rows.indices(n_rows)
        before = slice(start, min(stop, new_ids.start))
        between = range(max(start, new_ids.start), min(stop, new_ids.stop))
        after = slice(max(start, new_ids.stop), stop)
        if not between:
            return stored.read(rows)
        pieces = [mean().expand(len(between), *stored.shape[1:])]
        if before.start < before.stop:
            pieces.insert(0, stored.read(before).float())
        if after.start < after.stop:
            pieces.append(stored.read(after).float())
        return torch.cat(pieces)

    return StoredTensor((max(n_rows, stored.shape[0]), *stored.shape[1:]), read)
