"""Hugging Face's layout: safetensors files, and a config.json that transformers and vLLM read too."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ftlab.errors import ConfigError
from ftlab.models.config import ModelConfig
from ftlab.models.families import FAMILIES
from ftlab.models.rotary import Llama3RopeScaling
from ftlab.models.stored import KEY, StoredTensor, for_layers, read_json_object, refuse_lfs_pointer, refuse_variant

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

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
# What only some families have.
_QKV_BIAS = {
    f"blocks.{{}}.attention.{name}.bias": f"model.layers.{{}}.self_attn.{name}.bias"
    for name in ("q_proj", "k_proj", "v_proj")
}
_QK_NORM = {
    f"blocks.{{}}.attention.{name}.weight": f"model.layers.{{}}.self_attn.{name}.weight"
    for name in ("q_norm", "k_norm")
}


def hf_names(config: ModelConfig) -> dict[str, str]:
    """Our parameter names -> Hugging Face's; the head is among them, tied or not."""
    traits = FAMILIES[config.family]
    names = HF_NAMES | (_QKV_BIAS if traits.qkv_bias else {}) | (_QK_NORM if traits.qk_norm else {})
    return for_layers(names, config.n_layers)


def open_safetensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of model.safetensors, or of the files that the index names; headers are read, no weights."""
    tensors = {}
    for path in [folder / SINGLE] if (folder / SINGLE).is_file() else _indexed_shards(folder):
        refuse_lfs_pointer(path)
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
    refuse_lfs_pointer(index)
    try:
        files = sorted(set(read_json_object(index)["weight_map"].values()))
    except (ConfigError, KeyError, AttributeError, TypeError) as error:
        reason = error.problem if isinstance(error, ConfigError) else repr(error)
        raise ConfigError(KEY, f"{index} is not an index of safetensors shards: {reason}") from error
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


# ---- config.json

# Our configuration keys -> theirs, where the value is the same.
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_embeddings": "tie_word_embeddings",
}
# What transformers takes for a key that a config.json leaves out, where it is not null.
_ABSENT: dict[str, object] = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}
_ABSENT_OF_FAMILY: dict[str, dict[str, object]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen3": {"head_dim": 128},
}
_ROPE_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}


def read_config(folder: Path) -> dict[str, Any]:
    """What the folder's config.json says, under our keys; all of ``ModelConfig``'s but ``checkpoint``.

    Sizes that it does not name and that have no default there are absent.

    Raises:
        ConfigError: for a file that is no JSON object, or describes a model that is not one of ours.
    """
    raw = read_json_object(folder / CONFIG)
    family = family_of(folder, raw)
    raw = {**_ABSENT, **_ABSENT_OF_FAMILY.get(family, {}), **raw}
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers >= 5 / before
    raw["rope_theta"] = rope.get("rope_theta", raw["rope_theta"])
    for key, known in _ONLY.items():
        refuse_variant(folder, key, raw.get(key, known), known=known)
    quantized = (raw.get("quantization_config") or {}).get("quant_method")
    refuse_variant(folder, "quantization", quantized, known=None)
    sizes = {ours: raw[theirs] for ours, theirs in HF_CONFIG.items() if raw.get(theirs) is not None}
    if sizes.get("n_kv_heads") is None and "n_heads" in sizes:
        sizes["n_kv_heads"] = sizes["n_heads"]
    if raw.get("max_position_embeddings") is not None:
        sizes["max_seq_len"] = raw["max_position_embeddings"]
    return sizes | {
        "family": family,
        "rope_scaling": _rope_scaling(folder, rope),
        "sliding_window": _sliding_window(folder, raw) if FAMILIES[family].windows else None,
    }


# Values of config.json that change the computation, and those that ours does.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
}


def family_of(folder: Path, raw: Mapping[str, Any]) -> str:
    """The family that a config.json names.

    Raises:
        ConfigError: when it is not one of ours, with the architecture's name.
    """
    by_architecture = {traits.architecture: family for family, traits in FAMILIES.items()}
    architectures = raw.get("architectures") or []
    family = raw.get("model_type") or by_architecture.get(next(iter(architectures), ""))
    known = family in FAMILIES and (not architectures or by_architecture.get(architectures[0]) == family)
    if not known:
        name = next(iter(architectures), None) or family
        raise ConfigError(
            KEY,
            f"{folder / CONFIG} describes {name or 'no architecture'}; ftlab's own Transformer does "
            f"{', '.join(by_architecture)}",
            f"model=hf {KEY}={folder}",
        )
    return str(family)


def _rope_scaling(folder: Path, rope: Mapping[str, Any]) -> Llama3RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        refuse_variant(folder, "rope_type", kind, known="llama3")
    if absent := [theirs for theirs in _ROPE_SCALING.values() if theirs not in rope]:
        raise ConfigError(KEY, f"{folder / CONFIG} scales rotary embeddings, but does not say {', '.join(absent)}")
    return Llama3RopeScaling(**{ours: rope[theirs] for ours, theirs in _ROPE_SCALING.items()})


def _sliding_window(folder: Path, raw: Mapping[str, Any]) -> int | None:
    """The window of all layers. Qwen's files name one and say elsewhere that it is not used."""
    if not raw.get("use_sliding_window", "max_window_layers" not in raw):
        return None
    kinds = set(raw.get("layer_types") or [])
    mixed = len(kinds) > 1 or (not kinds and 0 < raw.get("max_window_layers", 0) < raw.get("num_hidden_layers", 0))
    refuse_variant(folder, "a sliding window in some layers", mixed, known=False)
    slides = kinds != {"full_attention"} and (kinds or raw.get("max_window_layers", 0) <= 0)
    return raw.get("sliding_window") if slides else None


def hf_config(config: ModelConfig, dtype: str) -> dict[str, object]:
    """The config.json of ``config``, in the form that transformers 4 and 5 and vLLM read alike."""
    scaling = config.rope_scaling
    described: dict[str, object] = {
        "architectures": [FAMILIES[config.family].architecture],
        "model_type": config.family,
        **{theirs: getattr(config, ours) for ours, theirs in HF_CONFIG.items()},
        "max_position_embeddings": config.max_seq_len,
        "rope_scaling": None
        if scaling is None
        else {"rope_type": "llama3", **{theirs: getattr(scaling, ours) for ours, theirs in _ROPE_SCALING.items()}},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
    }
    if FAMILIES[config.family].windows:
        described["sliding_window"] = config.sliding_window
    if config.family.startswith("qwen"):
        slides = config.sliding_window is not None
        described |= {"use_sliding_window": slides, "max_window_layers": 0 if slides else config.n_layers}
    return described
