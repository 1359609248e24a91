"""What a folder of pretrained weights holds, whichever layout it is in.

Opening reads headers only; a tensor's bytes are read (or paged in) when its rows are asked for, so a reader
that wants one tensor, or one shard of one tensor, pays for that alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlab.errors import ConfigError
from ftlab.models import hf_layout, meta_layout
from ftlab.models.config import ModelConfig
from ftlab.models.stored import KEY, StoredTensor

# Tables that older releases saved among the weights.
_COMPUTED = re.compile(r"(^|\.)(rope\.freqs|rotary_emb\.inv_freq)$")


@dataclass(frozen=True)
class Layout:
    """The tensors of a folder under the names its files use, and how ours translate to those."""

    names: dict[str, str]
    tensors: dict[str, StoredTensor]


def open_folder(folder: Path, config: ModelConfig) -> Layout:
    """Open the weights in a folder, whichever of the two layouts it has (Hugging Face first).

    Raises:
        ConfigError: for a folder with neither layout, an absent or damaged file, or a git-LFS pointer.
    """
    if (folder / hf_layout.SINGLE).is_file() or (folder / hf_layout.INDEX).is_file():
        names, tensors = hf_layout.hf_names(config), hf_layout.open_safetensors(folder)
    elif any(folder.glob("consolidated.*.pth")):
        names, tensors = meta_layout.meta_names(config), meta_layout.open_consolidated(folder, config)
    else:
        holds = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ConfigError(
            KEY,
            f"{folder} has no {hf_layout.SINGLE}, {hf_layout.INDEX} or consolidated.00.pth; it holds {holds}",
            fix=f"{KEY}=/path/to/folder",
        )
    return Layout(names, {name: t for name, t in tensors.items() if not _COMPUTED.search(name)})


def described_sizes(folder: Path) -> tuple[str, dict[str, Any]]:
    """What config.json or params.json in the folder says, under our keys; only what it does say.

    Returns:
        The file's name and the values; ("", {}) when the folder has neither file.

    Raises:
        ConfigError: for a file that is no JSON object, or describes a computation this Transformer does not
        do.
    """
    if (folder / hf_layout.CONFIG).is_file():
        return hf_layout.CONFIG, hf_layout.read_config(folder)
    if (folder / meta_layout.PARAMS).is_file():
        return meta_layout.PARAMS, meta_layout.read_params(folder)
    return "", {}
