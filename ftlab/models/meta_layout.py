"""Meta's layout: consolidated.NN.pth, each a model-parallel rank's slices, and params.json. Llamas only."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftlab.errors import ConfigError
from ftlab.models.config import ModelConfig
from ftlab.models.rotary import Llama3RopeScaling
from ftlab.models.stored import KEY, StoredTensor, for_layers, read_json_object, refuse_lfs_pointer

PARAMS = "params.json"

# Our names -> theirs; {} is the block's number.
META_NAMES = {
    "embedding.weight": "tok_embeddings.weight",
    "blocks.{}.attention_norm.weight": "layers.{}.attention_norm.weight",
    "blocks.{}.attention.q_proj.weight": "layers.{}.attention.wq.weight",
    "blocks.{}.attention.k_proj.weight": "layers.{}.attention.wk.weight",
    "blocks.{}.attention.v_proj.weight": "layers.{}.attention.wv.weight",
    "blocks.{}.attention.o_proj.weight": "layers.{}.attention.wo.weight",
    "blocks.{}.ffn_norm.weight": "layers.{}.ffn_norm.weight",
    "blocks.{}.ffn.gate_proj.weight": "layers.{}.feed_forward.w1.weight",
    "blocks.{}.ffn.up_proj.weight": "layers.{}.feed_forward.w3.weight",
    "blocks.{}.ffn.down_proj.weight": "layers.{}.feed_forward.w2.weight",
    "norm.weight": "norm.weight",
    "head.weight": "output.weight",
}


def meta_names(config: ModelConfig) -> dict[str, str]:
    """Our parameter names -> Meta's."""
    return for_layers(META_NAMES, config.n_layers)


def open_consolidated(folder: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Meta's layout: shard NN holds the slice of every matrix that model-parallel rank NN computed with.

    Memory: the shards are mapped, not read, and merging happens tensor by tensor as each is asked for.
    Above the model itself there is one merged tensor at a time and the pages it came from.
    """
    paths = sorted(folder.glob("consolidated.*.pth"))
    expected = [folder / f"consolidated.{i:02d}.pth" for i in range(len(paths))]
    if absent := [path.name for path in expected if path not in paths]:
        raise ConfigError(KEY, f"{folder} lacks {absent[0]}, but has {paths[-1].name}")
    shards = [_map_shard(path) for path in paths]
    tensors = {}
    for name in shards[0]:
        if not all(name in shard and shard[name].shape == shards[0][name].shape for shard in shards):
            raise ConfigError(KEY, f"the shards in {folder} are not of one model: they differ in {name}")
        tensors[name] = _merge(name, [shard[name] for shard in shards], config)
    return tensors


def _map_shard(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(KEY, f"{path} is not a regular file")
    refuse_lfs_pointer(path)
    try:
        shard = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or hostile pickle can make torch raise anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigError(KEY, f"{path} ({path.stat().st_size} bytes) cannot be read: {reason}") from error
    if not isinstance(shard, dict) or not all(isinstance(value, Tensor) for value in shard.values()):
        raise ConfigError(KEY, f"{path} is not a dict of tensors")
    return shard


def _merge(name: str, parts: list[Tensor], config: ModelConfig) -> StoredTensor:
    """The whole tensor from its slices, in rank order.

    Meta's model splits the output rows (dim 0) of wq, wk, wv, w1, w3 and the head, and the input columns
    (dim 1) of wo and w2; norms are whole in every shard. The embedding is split by columns in Llama 1 and
    2, by rows in Llama 3: only its width tells.
    """
    n_rows, whole = parts[0].shape[0], list(parts[0].shape)
    order = None
    if parts[0].ndim == 1:
        return StoredTensor(tuple(whole), lambda rows: parts[0][rows].clone())
    by_columns = name.endswith((".wo.weight", ".w2.weight")) or (
        name == META_NAMES["embedding.weight"] and parts[0].shape[1] != config.dim
    )
    whole[1 if by_columns else 0] *= len(parts)
    if is_rotated(name):
        order = _halves_from_pairs(n_rows, config)

    def read(rows: slice) -> Tensor:
        merged = torch.cat([part[rows] for part in parts], dim=1) if by_columns else stacked(rows)
        for part in parts:
            _release_pages(part)
        return merged

    def stacked(rows: slice) -> Tensor:
        start, stop, _ = rows.indices(whole[0])
        pieces = []
        for i, part in enumerate(parts):
            low, high = max(start - i * n_rows, 0), min(stop - i * n_rows, n_rows)
            if low < high:
                pieces.append(part[low:high] if order is None else part[order[low:high]])
        return torch.cat(pieces)

    return StoredTensor(tuple(whole), read)


def _release_pages(mapped: Tensor) -> None:
    """Take the pages of a tensor in a mapped file out of this process; they would be read again if need be.

    Without it the whole file ends up in the process's resident set, which is what job limits are held against.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        begin = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages: the first and last are shared
        size = mapped.data_ptr() + mapped.nbytes - begin
        if size > 0:
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _halves_from_pairs(n_rows: int, config: ModelConfig) -> Tensor | None:
    """Row order that turns Meta's rotary pairs (2i, 2i + 1) of each head into ours, (i, i + head_dim / 2).

    A shard holds whole heads, so the order is the same inside every shard. None where the rows are no whole
    number of heads: that file is of another model, which the comparison of shapes reports.
    """
    assert config.head_dim is not None  # ModelConfig resolved it
    if n_rows % config.head_dim:
        return None
    return torch.arange(n_rows).view(-1, config.head_dim // 2, 2).transpose(1, 2).flatten()


def is_rotated(name: str) -> bool:
    """Whether rotary embedding turns what the tensor of this name, Meta's, makes."""
    return name.endswith((".wq.weight", ".wk.weight"))


def pairs_from_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Whole heads' rows of a query or key projection in ours, (i, i + head_dim / 2), in Meta's order."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)


# ---- params.json

# In both under the same name.
_SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta")


def read_params(folder: Path) -> dict[str, Any]:
    """What the folder's params.json says, under ``ModelConfig``'s names.

    The feed-forward's width follows from rules in Meta's code; the shards' shapes tell it better. Llama 3.1
    and later say that they stretch rotary waves, and Meta's code says by how much: without a number, which
    files that ``meta_params`` wrote have, ``rope_scaling`` is absent from the result.
    """
    raw = read_json_object(folder / PARAMS)
    raw = {"rope_theta": 10000.0, "n_kv_heads": raw.get("n_heads"), **raw}
    # Llama 2 says vocab_size -1: "ask the tokenizer".
    sizes = {key: raw[key] for key in _SIZES if raw.get(key) not in (None, -1)}
    described = sizes | {"family": "llama", "sliding_window": None}
    if not raw.get("use_scaled_rope", False):
        described["rope_scaling"] = None
    elif "rope_scaling_factor" in raw:
        described["rope_scaling"] = Llama3RopeScaling(**{key: raw[f"rope_{name}"] for key, name in _ROPE.items()})
    return described


_ROPE = {
    "factor": "scaling_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_seq_len",
}


def meta_params(config: ModelConfig) -> dict[str, object]:
    """The params.json of ``config``."""
    # Meta's code: two thirds of 4 dim, times the multiplier, rounded up to a multiple; this makes it our width.
    unscaled = int(2 * (4 * config.dim) / 3)
    params: dict[str, object] = {
        **{key: getattr(config, key) for key in _SIZES},
        "multiple_of": config.ffn_hidden_dim,
        "ffn_dim_multiplier": None if unscaled <= config.ffn_hidden_dim else config.ffn_hidden_dim / unscaled,
        "use_scaled_rope": config.rope_scaling is not None,
    }
    if config.rope_scaling is not None:
        params |= {f"rope_{name}": getattr(config.rope_scaling, key) for key, name in _ROPE.items()}
    return params
