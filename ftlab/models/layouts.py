"""What a folder of pretrained weights holds: Hugging Face safetensors or Meta's consolidated shards.

Opening reads headers only; a tensor's bytes are read (or paged in) when its rows are asked for, so a reader
that wants one tensor, or one shard of one tensor, pays for that alone.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ftlab.errors import ConfigError
from ftlab.models.transformer import ModelConfig

KEY = "model.checkpoint"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# Our names -> theirs; {} is the block's number.
HF_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "blocks.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.attention.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attention.k_proj.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attention.v_proj.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attention.o_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.ffn.gate_proj.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.ffn.up_proj.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.ffn.down_proj.weight": "model.layers.{}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
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
# Tables that older releases saved among the weights.
_COMPUTED = re.compile(r"(^|\.)(rope\.freqs|rotary_emb\.inv_freq)$")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor still in its files: its shape, and ``read(rows)``, which brings those rows (dim 0)."""

    shape: tuple[int, ...]
    read: Callable[[slice], Tensor]


@dataclass(frozen=True)
class Layout:
    """The tensors of a folder under the names its files use, and how ours translate to those."""

    names: dict[str, str]
    tensors: dict[str, StoredTensor]


def hf_names(n_layers: int) -> dict[str, str]:
    """Our parameter names -> Hugging Face's, for a model of n_layers, in the model's order."""
    return _for_layers(HF_NAMES, n_layers)


def meta_names(n_layers: int) -> dict[str, str]:
    """Our parameter names -> Meta's, for a model of n_layers."""
    return _for_layers(META_NAMES, n_layers)


def _for_layers(names: dict[str, str], n_layers: int) -> dict[str, str]:
    return {
        ours.format(i): theirs.format(i)
        for ours, theirs in names.items()
        for i in (range(n_layers) if "{}" in ours else [0])
    }


def open_folder(folder: Path, config: ModelConfig) -> Layout:
    """Open the weights in a folder, whichever of the two layouts it has (Hugging Face first).

    Raises:
        ConfigError: for a folder with neither layout, an absent or damaged file, or a git-LFS pointer.
    """
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        names, tensors = hf_names(config.n_layers), _open_safetensors(folder)
    elif any(folder.glob("consolidated.*.pth")):
        names, tensors = meta_names(config.n_layers), _open_consolidated(folder, config)
    else:
        holds = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ConfigError(
            KEY,
            f"{folder} has no {SINGLE}, {INDEX} or consolidated.00.pth; it holds {holds}",
            fix=f"{KEY}=/path/to/folder",
        )
    return Layout(names, {name: t for name, t in tensors.items() if not _COMPUTED.search(name)})


def _open_safetensors(folder: Path) -> dict[str, StoredTensor]:
    tensors = {}
    for path in [folder / SINGLE] if (folder / SINGLE).is_file() else _indexed_shards(folder):
        _refuse_lfs_pointer(path)
        try:
            shard = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                KEY, f"{path} ({path.stat().st_size} bytes) is not a readable safetensors file: {error}"
            ) from error
        for name in shard.keys():  # noqa: SIM118 -- a safetensors handle, not a dict
            shape = tuple(shard.get_slice(name).get_shape())
            tensors[name] = StoredTensor(shape, partial(_read_rows, path, name))
    return tensors


def _read_rows(path: Path, name: str, rows: slice) -> Tensor:
    """Those rows of one tensor. The file is mapped for as long as they live: pages once read count as memory."""
    with safe_open(path, framework="pt") as shard:
        return shard.get_slice(name)[rows]


def _indexed_shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    _refuse_lfs_pointer(index)
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(KEY, f"{index} is not an index of safetensors shards: {error!r}") from error
    for file in files:
        # By name and not by resolved path: in the Hub's cache every file is a link out of the folder.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ConfigError(KEY, f"{index} names the shard {file!r}, which is not a safetensors file of that folder")
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise ConfigError(
            KEY,
            f"{folder} lacks {absent[0]}, named in {INDEX} ({len(absent)} of {len(files)} shards are absent)",
            fix="download the folder again, completely",
        )
    return [folder / file for file in files]


def _refuse_lfs_pointer(path: Path) -> None:
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


def _open_consolidated(folder: Path, config: ModelConfig) -> dict[str, StoredTensor]:
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
    _refuse_lfs_pointer(path)
    try:
        shard = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0]
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
    if name.endswith((".wq.weight", ".wk.weight")):
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


# Our configuration keys -> those of config.json (Hugging Face).
HF_CONFIG = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_embeddings": "tie_word_embeddings",
}


def described_sizes(folder: Path) -> tuple[str, dict[str, Any]]:
    """What config.json or params.json in the folder says, under our keys; only what it does say.

    Returns:
        The file's name and the values; ("", {}) when the folder has neither file.

    Raises:
        ConfigError: for a file that is no JSON object, or describes a computation this Transformer does not
        do.
    """
    if (folder / "config.json").is_file():
        raw = _read_json_object(folder / "config.json")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers >= 5 / before
        variant = rope.get("rope_type") or rope.get("type") or "default"
        _refuse_variant(folder, "hidden_act", raw.get("hidden_act", "silu"), known="silu")
        _refuse_variant(folder, "rope_type", variant, known="default")
        # Both absent from the first Llama 2 exports, which mean transformers' defaults.
        raw.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        raw.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
        sizes = {ours: raw.get(theirs) for ours, theirs in HF_CONFIG.items()}
        return "config.json", {key: value for key, value in sizes.items() if value is not None}
    if (folder / "params.json").is_file():
        raw = _read_json_object(folder / "params.json")
        _refuse_variant(folder, "use_scaled_rope", raw.get("use_scaled_rope", False), known=False)
        raw = {"rope_theta": 10000.0, "n_kv_heads": raw.get("n_heads"), **raw}
        keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta")
        # Llama 2 says vocab_size -1: "ask the tokenizer".
        return "params.json", {key: raw[key] for key in keys if raw.get(key) not in (None, -1)}
    return "", {}


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(KEY, f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(KEY, f"{path} is not a JSON object")
    return content


def _refuse_variant(folder: Path, key: str, value: object, *, known: object) -> None:
    if value != known:
        raise ConfigError(KEY, f"{folder} is a model with {key}={value}; ftlab's Transformer knows {key}={known} only")
