"""Every family against transformers: logits, gradients, weights in and out, and what its config.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ftlab.errors import ConfigError, ConfigErrors
from ftlab.models.config import ModelConfig
from ftlab.models.hf_layout import hf_names, read_config
from ftlab.models.transformer import Transformer
from ftlab.models.weights import export_weights, load_weights

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 500000.0,
}  # fmt: skip
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
# What transformers calls each kind of model that we build ourselves.
KINDS: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", "rope_parameters": DEFAULT},
    "llama3": {"model_type": "llama", "rope_parameters": DEFAULT | {"rope_theta": 500000.0}},
    "llama3.1": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama3.2": {"model_type": "llama", "rope_parameters": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True},
    "smollm2": {"model_type": "llama", "rope_parameters": DEFAULT, "tie_word_embeddings": True},
    "mistral v0.1": {"model_type": "mistral", "rope_parameters": DEFAULT, "sliding_window": 5},
    "mistral v0.3": {"model_type": "mistral", "rope_parameters": DEFAULT, "sliding_window": None},
    "qwen2.5": {"model_type": "qwen2", "rope_parameters": DEFAULT},
    "qwen2.5 tied": {"model_type": "qwen2", "rope_parameters": DEFAULT, "tie_word_embeddings": True},
    "qwen2.5 windowed": {
        "model_type": "qwen2", "rope_parameters": DEFAULT, "use_sliding_window": True, "sliding_window": 4,
        "max_window_layers": 0,
    },
    "qwen3": {"model_type": "qwen3", "rope_parameters": DEFAULT},
    "qwen3 tied": {"model_type": "qwen3", "rope_parameters": DEFAULT, "tie_word_embeddings": True},
}  # fmt: skip


@st.composite
def sizes(draw) -> dict[str, Any]:
    n_kv_heads = draw(st.integers(1, 2))
    n_heads = n_kv_heads * draw(st.integers(1, 3))
    return {
        "hidden_size": n_heads * draw(st.sampled_from([4, 6, 16])),
        "intermediate_size": draw(st.integers(2, 40)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": draw(st.sampled_from([8, 10])),
        "vocab_size": 61,
        "max_position_embeddings": 64,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
    }


def theirs_of(kind: str, sizes: dict[str, Any], seed: int) -> Any:
    """transformers' model with every parameter random: its own initialisation leaves biases 0 and gains 1."""
    torch.manual_seed(seed)
    described = sizes | KINDS[kind]
    config = AutoConfig.for_model(**described | {"bos_token_id": 1, "eos_token_id": 2})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if name.endswith(("norm.weight", "bias")) else 0.15
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, scale)
    return model.eval()


def ours_of(folder: Path) -> Transformer:
    """The folder's model, by its config.json alone."""
    config = ModelConfig(**read_config(folder), checkpoint=str(folder))
    with torch.device("meta"):
        model = config.build()
    model.to_empty(device="cpu")
    load_weights(model, folder)
    return model


def export(model: Transformer, folder: Path) -> Path:
    export_weights(model, folder, dtype=torch.float32, bos_id=1, eos_id=2, pad_id=None)
    return folder


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-6)).item()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(sizes=sizes(), seed=st.integers(0, 2**31))
def test_logits_gradients_and_folders_agree_with_transformers(kind, sizes, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    theirs = theirs_of(kind, sizes, seed)
    theirs.save_pretrained(folder / "theirs")
    model = ours_of(folder / "theirs")
    tokens = torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(seed))

    logits, expected = model(tokens), theirs(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)

    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    F.cross_entropy(expected.flatten(0, 1), tokens.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        error = relative(parameter.grad, gradients[hf_names(model.config)[name]])
        assert error < 1e-4, f"{name}: {error:.2e}"

    # Import -> export -> import: the same bits, and transformers opens what was exported with the same logits.
    again = ours_of(export(model, folder / "ours"))
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert again.config.replace(checkpoint=None) == model.config.replace(checkpoint=None)
    opened, report = AutoModelForCausalLM.from_pretrained(
        folder / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(opened) is type(theirs)
    assert torch.equal(opened(tokens).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_config_describes_the_computation_that_was_imported(kind, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61, "max_position_embeddings": 64}  # fmt: skip
    theirs = theirs_of(kind, sizes, 0)
    theirs.save_pretrained(tmp_path / "theirs")
    export(ours_of(tmp_path / "theirs"), tmp_path / "ours")
    before, after = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("theirs", "ours"))
    ignored = {"dtype", "transformers_version", "_name_or_path", "attention_bias", "mlp_bias", "max_window_layers"}
    for key in before.keys() - ignored:
        assert after[key] == before[key], key


def test_initial_weights_have_no_bias_and_gains_of_one():
    config = ModelConfig(
        family="qwen2", dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=None, ffn_hidden_dim=8, vocab_size=9,
        norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, max_seq_len=8, sliding_window=None, tie_embeddings=True,
        checkpoint=None,
    )  # fmt: skip
    for family, name, value in (("qwen2", "q_proj.bias", 0.0), ("qwen3", "q_norm.weight", 1.0)):
        model = config.replace(family=family).build()
        model.init_weights(0)
        parameter = model.get_parameter(f"blocks.0.attention.{name}")
        assert torch.equal(parameter, torch.full_like(parameter, value))


# ---- folders that are not what they seem


@pytest.fixture
def folder(tmp_path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61, "max_position_embeddings": 64}  # fmt: skip
    theirs_of("qwen2.5", sizes, 0).save_pretrained(tmp_path)
    return tmp_path


def rewritten(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))
    return folder


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}, "describes GPTNeoXForCausalLM"),
        ({"architectures": ["Qwen2ForRewardModel"]}, "describes Qwen2ForRewardModel"),
        ({"model_type": "gemma2", "architectures": "absent"}, "describes gemma2"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "rope_type=yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "does not say low_freq_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization=gptq"),
        (
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": "absent"},
            "a sliding window in some layers",
        ),
    ],
)
def test_what_the_transformer_does_not_compute_is_refused_by_name(folder, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        read_config(rewritten(folder, **changes))


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 32768}, None),
        ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3, "layer_types": "absent"}, None),
        ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0, "layer_types": "absent"}, 7),
        ({"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention"] * 3}, 7),
        ({"model_type": "mistral", "architectures": "absent", "sliding_window": 9, "max_window_layers": "absent",
          "use_sliding_window": "absent", "layer_types": "absent"}, 9),
        ({"model_type": "mistral", "architectures": "absent", "sliding_window": "absent",
          "max_window_layers": "absent", "use_sliding_window": "absent", "layer_types": "absent"}, 4096),
    ],
)  # fmt: skip
def test_the_window_is_the_one_that_transformers_would_use(folder, changes, window):
    assert read_config(rewritten(folder, **changes))["sliding_window"] == window


def test_weights_of_another_family_are_refused(folder):
    config = ModelConfig(**read_config(folder), checkpoint=None)
    model = config.replace(family="mistral").build()
    with pytest.raises(ConfigErrors, match=r"model\.family: mistral, but .*config\.json says qwen2"):
        load_weights(model, folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"k_proj\.bias .* has no place in the model.* 9 are left over"):
        load_weights(model, folder)


def test_scaling_that_contradicts_the_folder_points_at_auto(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 61, "max_position_embeddings": 64}  # fmt: skip
    theirs_of("llama3.1", sizes, 0).save_pretrained(tmp_path)
    model = ModelConfig(**read_config(tmp_path) | {"rope_scaling": None}, checkpoint=None).build()
    with pytest.raises((ConfigError, ConfigErrors), match=r"model\.rope_scaling: None, but .*factor=8\.0"):
        load_weights(model, tmp_path)


def test_a_tied_folder_stores_its_embedding_once(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 61, "max_position_embeddings": 64}  # fmt: skip
    theirs_of("qwen3 tied", sizes, 0).save_pretrained(tmp_path / "theirs")
    export(ours_of(tmp_path / "theirs"), tmp_path / "ours")
    assert (
        load_file(tmp_path / "ours/model.safetensors").keys() == load_file(tmp_path / "theirs/model.safetensors").keys()
    )
