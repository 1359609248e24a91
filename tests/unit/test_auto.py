"""``model=auto``, finding checkpoints, and what is refused before anything large is fetched or read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftlab.errors import ConfigError, ConfigErrors
from ftlab.models import hub
from ftlab.models.auto import AutoModelConfig, as_exported, find_model
from ftlab.models.hub import commit_of, resolve_checkpoint
from ftlab.models.rotary import Llama3RopeScaling
from ftlab.models.weights import export_weights, load_weights
from tests.unit.test_weights import assert_same_bits, export, model_of, small, write_meta_folder

SCALING = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)
VARIANTS = {
    "llama": {},
    "llama 3.1": {"rope_scaling": SCALING, "rope_theta": 500000.0},
    "tied": {"tie_embeddings": True, "head_dim": 12},
    "mistral": {"family": "mistral", "sliding_window": 7},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "head_dim": 20},
}


def found(folder: Path):
    config, weights = find_model(AutoModelConfig(checkpoint=str(folder)))
    assert weights == folder
    return config


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_describes_the_model_that_wrote_it(variant, tmp_path):
    model = model_of(small(**VARIANTS[variant]))
    config = found(export(model, tmp_path))
    assert config == model.config.replace(checkpoint=str(tmp_path))
    again = config.build()
    load_weights(again, tmp_path)
    assert_same_bits(model, again)


@pytest.mark.parametrize("n_shards", [1, 2])
def test_a_folder_of_meta_s_describes_itself_with_its_shards(n_shards, tmp_path):
    model = model_of(small())
    state = load_file(export(model, tmp_path / "hf") / "model.safetensors")
    folder = write_meta_folder(state, model.config, tmp_path / "meta", n_shards)
    config = found(folder)
    assert config == model.config.replace(checkpoint=str(folder), max_seq_len=4096)
    again = config.build()
    load_weights(again, folder)
    assert_same_bits(model, again)


def test_stretched_waves_without_a_number_are_not_guessed(tmp_path):
    state = load_file(export(model_of(small()), tmp_path / "hf") / "model.safetensors")
    folder = write_meta_folder(state, small(), tmp_path / "meta", 1)
    params = json.loads((folder / "params.json").read_text()) | {"use_scaled_rope": True}
    (folder / "params.json").write_text(json.dumps(params))
    with pytest.raises(ConfigError, match=r"params\.json does not say rope_scaling"):
        found(folder)


def test_a_folder_that_says_nothing_is_refused(tmp_path):
    export(model_of(small()), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"neither config\.json nor params\.json"):
        found(tmp_path)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"])
def test_a_config_that_leaves_out_a_size_is_told_which(key, tmp_path):
    export(model_of(small()), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content[key]
    (tmp_path / "config.json").write_text(json.dumps(content))
    if key == "vocab_size":  # the tokenizer's then
        assert found(tmp_path).vocab_size is None
    else:
        with pytest.raises(ConfigError, match=r"config\.json does not say"):
            found(tmp_path)


@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads"])
def test_sizes_that_follow_from_others_may_be_absent(key, tmp_path):
    export(model_of(small(n_kv_heads=None)), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content[key]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert found(tmp_path) == small(n_kv_heads=None, checkpoint=str(tmp_path))


@pytest.mark.parametrize("content", ["", "[1]", '{"model_type": "llama", "hidden_size": "wide"}', "\x00"])
def test_a_config_that_is_none_is_refused(content, tmp_path):
    export(model_of(small()), tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((ConfigError, ConfigErrors)):
        found(tmp_path)


def test_what_a_run_exported_is_read_whatever_its_vocabulary_became(tmp_path):
    export(model_of(small(vocab_size=70)), tmp_path)
    assert as_exported(small(vocab_size=60), tmp_path).vocab_size == 70


# ---- before weights are fetched


class Hub:
    """The Hub as ``hub.py`` sees it: a repository with a config.json, and a log of what was asked for."""

    def __init__(self, monkeypatch, cache: Path, config: dict):
        import huggingface_hub

        self.asked: list[tuple[str, str | None, bool]] = []
        self.commit = "0123456789abcdef0123456789abcdef01234567"
        self.folder = cache / "snapshots" / self.commit
        self.folder.mkdir(parents=True)
        (self.folder / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)

    def snapshot(self, repo_id, *, revision, allow_patterns, **_):
        self.asked.append((repo_id, revision, "*.safetensors" in allow_patterns))
        return str(self.folder)


def test_another_architecture_is_refused_before_its_weights_are_fetched(monkeypatch, tmp_path):
    fake = Hub(monkeypatch, tmp_path, {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]})
    with pytest.raises(ConfigError, match="Gemma2ForCausalLM"):
        find_model(AutoModelConfig(checkpoint="google/gemma-2-2b"))
    assert fake.asked == [("google/gemma-2-2b", None, False)]


def test_a_named_size_that_is_not_the_checkpoint_s_is_refused_before_too(monkeypatch, tmp_path):
    config = json.loads((export(model_of(small()), tmp_path / "hf") / "config.json").read_text())
    fake = Hub(monkeypatch, tmp_path, config)
    with pytest.raises(ConfigError, match=r"model\.n_layers: 3, but .*config\.json says 2"):
        find_model(small(n_layers=3, checkpoint="a/b"))
    assert [weights for _, _, weights in fake.asked] == [False]


def test_a_revision_is_pinned_and_its_commit_known(monkeypatch, tmp_path):
    fake = Hub(monkeypatch, tmp_path, {})
    folder = resolve_checkpoint("meta-llama/Llama-2-7b-hf@v1.0")
    assert fake.asked == [("meta-llama/Llama-2-7b-hf", "v1.0", True)]
    assert commit_of(folder) == fake.commit
    assert commit_of(tmp_path) is None


def test_a_revision_out_of_reach_is_named(monkeypatch):
    import huggingface_hub

    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    with pytest.raises(ConfigError, match=r"no-such-group/no-such-model@main is not on this machine"):
        resolve_checkpoint("no-such-group/no-such-model@main")


def test_a_gated_repository_says_what_to_do(monkeypatch):
    import huggingface_hub
    from httpx import Request, Response
    from huggingface_hub.errors import GatedRepoError

    def gated(*args, **kwargs):
        raise GatedRepoError("403", response=Response(403, request=Request("GET", "https://huggingface.co")))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", gated)
    with pytest.raises(ConfigError, match=r"is gated: accept its licence .* or give the path of a local copy"):
        resolve_checkpoint("meta-llama/Llama-2-7b-hf")


def test_the_timeout_is_short_enough_to_wait_for():
    assert hub.HUB_TIMEOUT_S <= 10


def test_an_export_in_bfloat16_says_so(tmp_path):
    export_weights(model_of(small()), tmp_path, dtype=torch.bfloat16, bos_id=1, eos_id=2, pad_id=None)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
