"""The rows of a run and the tokenizer that they are read with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftlab.config.build import Config, build
from ftlab.data.base import TrainingData
from ftlab.data.cache import cache_folder
from ftlab.data.tokenizers import Tokenizer
from ftlab.errors import ConfigError
from ftlab.training.opened import Opened
from ftlab.typed import override


def beside_checkpoint(tokenizer: Config, named: str | None, folder: Path | None) -> Config:
    """The tokenizer's node; where its path is the model's, it reads the folder that this was resolved to."""
    follows = folder is not None and tokenizer.get("path") == named
    return tokenizer | {"path": str(folder)} if follows else tokenizer


def read_data(config: Config, tokenizer: Tokenizer, **given: Any) -> TrainingData:
    """The rows of ``config``, tokenised; from the cache where they are in it.

    Args:
        given: ``progress`` and what else a dataset takes at run time.
    """
    found: TrainingData = build(
        config["dataset"],
        tokenizer=tokenizer,
        seq_len=config["seq_len"],
        seed=config["seed"] or 0,
        cache_dir=cache_folder(config["paths"]["cache_dir"]),
        **{"progress": None} | given,
    )
    return found


def is_packed(config: Config) -> bool:
    """Whether training rows are packs of several samples, all of one length; of a mixture, those of any of its sets."""
    sets = config["dataset"].get("sets", {"all": config["dataset"]})
    return any(one.get("packing", "none") != "none" for one in sets.values())


def require_same_inputs(opened: Opened, data: TrainingData, tokenizer: Tokenizer) -> None:
    """Refuse to go on with other rows or another tokenizer than the run was trained with."""
    now = {"dataset": data.fingerprint, "tokenizer": tokenizer.fingerprint}
    then = {"dataset": opened.told["data"], "tokenizer": opened.told["tokenizer"]}
    for key in ("tokenizer", "dataset"):
        if now[key] != then[key]:
            begin = override("init_from", str(opened.path.parent.parent))
            raise ConfigError(
                key,
                f"the run was trained with other {'rows' if key == 'dataset' else 'tokens'} (fingerprint "
                f"{then[key][:12]}…, here {now[key][:12]}…)",
                f"the same files as then, or a new run from its weights: {begin}",
            )
