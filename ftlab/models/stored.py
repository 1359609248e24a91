"""Tensors that are still in their files, and what is said of files that cannot be read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ftlab.errors import ConfigError
from ftlab.storage.disk import read_small_file

KEY = "model.checkpoint"
_MAX_JSON_BYTES = 256 * 2**20  # the index of a model of a million tensors has less


@dataclass(frozen=True)
class StoredTensor:
    """A tensor still in its files: its shape, and ``read(rows)``, which brings those rows (dim 0)."""

    shape: tuple[int, ...]
    read: Callable[[slice], Tensor]


def for_layers(names: dict[str, str], n_layers: int) -> dict[str, str]:
    """``names`` with every block's number in place of {}."""
    return {
        ours.format(i): theirs.format(i)
        for ours, theirs in names.items()
        for i in (range(n_layers) if "{}" in ours else [0])
    }


def refuse_lfs_pointer(path: Path) -> None:
    """Say so where git left a pointer in place of a large file."""
    size = path.stat().st_size
    if size > 1024:
        return
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        real = re.search(rb"size (\d+)", content)
        raise ConfigError(
            KEY,
            f"{path} is a git-LFS pointer of {size} bytes, not the weights"
            + (f" ({int(real[1]):,} bytes)" if real else ""),
            fix=f"git -C {path.parent} lfs pull",
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; anything else in it is refused."""
    try:
        content = json.loads(read_small_file(path, _MAX_JSON_BYTES))
    except OSError as error:
        raise ConfigError(KEY, f"{path} {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(KEY, f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(KEY, f"{path} is not a JSON object")
    return content


def refuse_variant(folder: Path, key: str, value: object, *, known: object) -> None:
    """Refuse weights that ask for a computation which the Transformer does not do."""
    if value != known:
        raise ConfigError(
            KEY, f"{folder} is a model with {key}={value}; ftlab's Transformer knows {key}={known} only", "model=hf"
        )
