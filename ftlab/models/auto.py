"""Models that a checkpoint describes itself, and what is asked of a checkpoint before its weights are fetched."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ftlab.errors import ConfigError
from ftlab.models.config import ModelConfig
from ftlab.models.hf import HFModel, HFModelConfig, HFTransformer
from ftlab.models.hub import resolve_checkpoint
from ftlab.models.layouts import described_sizes, open_folder
from ftlab.models.meta_layout import META_NAMES, PARAMS
from ftlab.models.stored import KEY
from ftlab.models.transformer import Transformer
from ftlab.models.weights import compare_sizes

AnyModelConfig = ModelConfig | HFModelConfig
AnyModel = Transformer | HFTransformer


@dataclass(frozen=True, kw_only=True)
class AutoModelConfig:
    """``model=auto``: the Transformer that the checkpoint's config.json, or Meta's params.json, describes.

    Args:
        checkpoint: folder, or Hub id with or without ``@revision``.
    """

    checkpoint: str

    def read(self, folder: Path) -> ModelConfig:
        """The numbers in ``folder``; no weights are read.

        Raises:
            ConfigError: for a folder that describes nothing, another architecture (by name), or less than is needed.
        """
        file, sizes = described_sizes(folder)
        if not file:
            raise ConfigError(
                KEY,
                f"{folder} has neither config.json nor {PARAMS} to say what it is",
                "a named option, such as model=llama3_1_8b",
            )
        known = {"max_seq_len": _META_MAX_SEQ_LEN, "ffn_hidden_dim": 1} if file == PARAMS else {}
        sizes = {**_FOLLOWING, **known, **sizes, "checkpoint": self.checkpoint}
        absent = [field.name for field in fields(ModelConfig) if field.name not in sizes]
        if absent:
            raise ConfigError(
                KEY, f"{folder / file} does not say {', '.join(absent)}", "a named option, such as model=llama3_1_8b"
            )
        config = ModelConfig(**sizes)
        return _with_shapes_of_shards(config, folder) if file == PARAMS else config


# What files leave out, and follows from other sizes or from the tokenizer.
_FOLLOWING: dict[str, Any] = {"vocab_size": None, "n_kv_heads": None, "head_dim": None, "tie_embeddings": False}
_META_MAX_SEQ_LEN = 4096  # Llama 2's; Meta's files do not say it, and every later model reads as much


def _with_shapes_of_shards(config: ModelConfig, folder: Path) -> ModelConfig:
    """What params.json leaves to Meta's code, from the tensors themselves."""
    tensors = open_folder(folder, config).tensors
    width, head = META_NAMES["blocks.{}.ffn.gate_proj.weight"].format(0), META_NAMES["head.weight"]
    if width not in tensors or head not in tensors:
        raise ConfigError(KEY, f"{folder} holds no Llama in Meta's layout: {width} or {head} is absent")
    return config.replace(ffn_hidden_dim=tensors[width].shape[0], vocab_size=tensors[head].shape[0])


def find_model(
    named: ModelConfig | AutoModelConfig | HFModel, *, fetch: bool = True
) -> tuple[AnyModelConfig, Path | None]:
    """What the model is, and the folder of its weights; None for random ones.

    What a folder says of itself is compared before a Hub repository's weights are fetched. The vocabulary is left
    to whoever knows the tokenizer.

    Args:
        fetch: False where the weights come from elsewhere: there is no folder then.

    Raises:
        ConfigError, ConfigErrors: when the checkpoint is not there, or is another model.
    """
    if named.checkpoint is None:
        assert isinstance(named, ModelConfig)  # the others are nothing without one
        return named, None
    if isinstance(named, ModelConfig) and not fetch:
        return named, None
    described = resolve_checkpoint(named.checkpoint, weights=False)
    if isinstance(named, ModelConfig):
        compare_sizes(named, described, but=("vocab_size",))
        return named, resolve_checkpoint(named.checkpoint)
    config = named.read(described)
    return config, resolve_checkpoint(named.checkpoint) if fetch else None


def as_exported(named: ModelConfig | AutoModelConfig | HFModel, folder: Path) -> AnyModelConfig:
    """The model that a run of ``named`` wrote into ``folder``, whatever became of its vocabulary."""
    kind = HFModel if isinstance(named, HFModel) else AutoModelConfig
    return kind(checkpoint=str(folder)).read(folder)
