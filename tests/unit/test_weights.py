"""Pretrained weights in (Hugging Face, Meta), trained weights out, and what is said when a folder is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ftlab.errors import ConfigError, ConfigErrors
from ftlab.models.config import ModelConfig
from ftlab.models.hub import resolve_checkpoint
from ftlab.models.layouts import open_folder
from ftlab.models.rotary import Llama3RopeScaling
from ftlab.models.transformer import Transformer
from ftlab.models.weights import export_meta_weights, export_weights, load_weights

SCALING = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)


def small(**changes) -> ModelConfig:
    sizes = {
        "dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "head_dim": None, "ffn_hidden_dim": 96,
        "vocab_size": 60, "norm_eps": 1e-5, "rope_theta": 10000.0, "max_seq_len": 64,
        "sliding_window": None, "family": "llama", "rope_scaling": None,
        "tie_embeddings": False, "checkpoint": None,
    }  # fmt: skip
    return ModelConfig(**(sizes | changes))


def model_of(config: ModelConfig, seed: int = 0) -> Transformer:
    model = config.build()
    model.init_weights(seed)
    return model


def export(model, folder, *, dtype=torch.float32, **options):
    export_weights(model, folder, dtype=dtype, bos_id=1, eos_id=2, pad_id=0, **options)
    return folder


def loaded(folder, config) -> Transformer:
    with torch.device("meta"):
        model = config.build()
    model.to_empty(device="cpu")
    load_weights(model, folder)
    return model


def assert_same_bits(model, other):
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def write_meta_folder(state, config, folder, n_shards, *, split_embedding_dim=1):
    """Cut a Hugging Face state dict the way Meta's model parallelism does, rotary pairs side by side."""

    def pairs_side_by_side(weight, n_heads):
        return weight.view(n_heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)

    whole = {
        "tok_embeddings.weight": (state["model.embed_tokens.weight"], split_embedding_dim),
        "norm.weight": (state["model.norm.weight"], None),
        "output.weight": (state["lm_head.weight"], 0),
    }
    for i in range(config.n_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        q = pairs_side_by_side(state[theirs + "self_attn.q_proj.weight"], config.n_heads)
        k = pairs_side_by_side(state[theirs + "self_attn.k_proj.weight"], config.n_kv_heads)
        whole |= {
            ours + "attention.wq.weight": (q, 0),
            ours + "attention.wk.weight": (k, 0),
            ours + "attention.wv.weight": (state[theirs + "self_attn.v_proj.weight"], 0),
            ours + "attention.wo.weight": (state[theirs + "self_attn.o_proj.weight"], 1),
            ours + "feed_forward.w1.weight": (state[theirs + "mlp.gate_proj.weight"], 0),
            ours + "feed_forward.w2.weight": (state[theirs + "mlp.down_proj.weight"], 1),
            ours + "feed_forward.w3.weight": (state[theirs + "mlp.up_proj.weight"], 0),
            ours + "attention_norm.weight": (state[theirs + "input_layernorm.weight"], None),
            ours + "ffn_norm.weight": (state[theirs + "post_attention_layernorm.weight"], None),
        }
    folder.mkdir()
    for n in range(n_shards):
        shard = {name: (w if dim is None else w.chunk(n_shards, dim)[n]).clone() for name, (w, dim) in whole.items()}
        shard["rope.freqs"] = torch.ones(config.head_dim // 2)
        torch.save(shard, folder / f"consolidated.{n:02d}.pth")
    params = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads,
              "n_kv_heads": config.n_kv_heads, "norm_eps": config.norm_eps, "multiple_of": 32,
              "vocab_size": -1}  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    return folder


# ---- weights in and out


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_export_and_import_are_bitwise(tmp_path, dtype, tie_embeddings):
    model = model_of(small(tie_embeddings=tie_embeddings)).to(dtype)
    first = export(model, tmp_path / "first", dtype=dtype)
    again = loaded(first, model.config).to(dtype)
    second = export(again, tmp_path / "second", dtype=dtype)
    assert_same_bits(model, again)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"head_dim": 12, "rope_theta": 5e5}])
def test_transformers_opens_the_export_with_the_same_logits(tmp_path, changes, max_shard_bytes):
    model = model_of(small(**changes))
    export(model, tmp_path, max_shard_bytes=max_shard_bytes)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = torch.arange(40).view(2, 20)
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_a_folder_saved_by_transformers_loads(tmp_path):
    model = model_of(small())
    theirs = AutoModelForCausalLM.from_pretrained(export(model, tmp_path / "ours"))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert_same_bits(model, loaded(tmp_path / "theirs", model.config))


def test_a_bfloat16_folder_loads_into_float32_parameters(tmp_path):
    model = model_of(small())
    again = loaded(export(model, tmp_path, dtype=torch.bfloat16), model.config)
    assert again.embedding.weight.dtype == torch.float32
    assert torch.equal(again.embedding.weight, model.embedding.weight.bfloat16().float())


@pytest.mark.parametrize("split_embedding_dim", [0, 1])
@pytest.mark.parametrize("n_shards", [1, 2, 8])
def test_meta_shards_load_bitwise_equal_to_their_hugging_face_form(tmp_path, n_shards, split_embedding_dim):
    model = model_of(small(n_kv_heads=8, vocab_size=64))
    hf = export(model, tmp_path / "hf")
    state = load_file(hf / "model.safetensors")
    meta = write_meta_folder(state, model.config, tmp_path / "meta", n_shards, split_embedding_dim=split_embedding_dim)
    assert_same_bits(loaded(hf, model.config), loaded(meta, model.config))


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_rows_of_a_stored_tensor_are_rows_of_the_whole(tmp_path, layout):
    model = model_of(small())
    folder = export(model, tmp_path / "hf")
    if layout == "meta":
        state = load_file(folder / "model.safetensors")
        folder = write_meta_folder(state, model.config, tmp_path / "meta", 4)
    opened = open_folder(folder, model.config)
    for name, parameter in model.named_parameters():
        stored, n_rows = opened.tensors[opened.names[name]], parameter.shape[0]
        for rows in (slice(0, n_rows // 3), slice(n_rows // 3, n_rows)):
            assert torch.equal(stored.read(rows), parameter[rows]), name


def test_export_splits_files_at_the_limit_and_indexes_every_tensor(tmp_path):
    model = model_of(small())
    export(model, tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert len(index["weight_map"]) == len(list(model.parameters()))
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in model.parameters())
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= max(20_000, largest)  # noqa: SIM118


def test_export_over_an_older_one_leaves_no_stale_weights(tmp_path):
    export(model_of(small(), seed=0), tmp_path, max_shard_bytes=20_000)
    model = model_of(small(), seed=1)
    export(model, tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert_same_bits(model, loaded(tmp_path, model.config))


def test_exported_configs_carry_the_tokenizer_s_ids(tmp_path):
    export_weights(model_of(small()), tmp_path, dtype=torch.float32, bos_id=7, eos_id=8, pad_id=None)
    for file in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / file).read_text())
        ids = [content[f"{token}_token_id"] for token in ("bos", "eos", "pad")]
        assert ids == [7, 8, None], file


def test_a_tied_export_leaves_the_head_out_and_one_that_has_it_loads(tmp_path):
    model = model_of(small(tie_embeddings=True))
    path = export(model, tmp_path) / "model.safetensors"
    state = load_file(path)
    assert "lm_head.weight" not in state
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, path)
    assert_same_bits(model, loaded(tmp_path, model.config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": True}, {"ffn_hidden_dim": 500, "rope_theta": 5e5}, {"rope_scaling": SCALING}],
)
def test_an_export_in_meta_s_layout_loads_bitwise(tmp_path, changes, dtype):
    model = model_of(small(**changes)).to(dtype)
    export_meta_weights(model, tmp_path, dtype=dtype)
    assert_same_bits(model, loaded(tmp_path, model.config).to(dtype))


def test_meta_s_own_arithmetic_finds_the_feed_forward_s_width_in_an_exported_params_json(tmp_path):
    for width in (8, 96, 170, 171, 500):
        export_meta_weights(model_of(small(ffn_hidden_dim=width)), tmp_path, dtype=torch.float32)
        params = json.loads((tmp_path / "params.json").read_text())
        hidden = int(2 * (4 * params["dim"]) / 3)  # as in Meta's FeedForward
        if params["ffn_dim_multiplier"] is not None:
            hidden = int(params["ffn_dim_multiplier"] * hidden)
        assert params["multiple_of"] * ((hidden + params["multiple_of"] - 1) // params["multiple_of"]) == width


def test_meta_s_layout_is_for_llamas(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.family.* for Llamas, and this is a qwen3"):
        export_meta_weights(model_of(small(family="qwen3")), tmp_path, dtype=torch.float32)


# ---- folders that do not fit


def test_a_contradicting_config_names_key_both_values_and_the_override(tmp_path):
    folder = export(model_of(small(rope_theta=500000.0)), tmp_path)
    with pytest.raises(ConfigError) as caught:
        loaded(folder, small())
    assert caught.value.key == "model.rope_theta"
    assert "10000.0" in caught.value.problem
    assert "500000.0" in caught.value.problem
    assert caught.value.fix == "model.rope_theta=500000.0"


def test_every_contradicting_key_is_reported_at_once(tmp_path):
    folder = export(model_of(small(vocab_size=64, norm_eps=1e-6)), tmp_path)
    with pytest.raises(ConfigErrors) as caught:
        loaded(folder, small())
    assert [problem.key for problem in caught.value.problems] == [
        "model.vocab_size",
        "model.norm_eps",
        "model.checkpoint",
    ]
    shapes = caught.value.problems[-1].problem
    assert "model.embed_tokens.weight is (64, 64), the model's embedding.weight is (60, 64)" in shapes
    assert "21 tensors 2 differ in shape" in shapes


def test_meta_params_are_compared_too(tmp_path):
    model = model_of(small())
    state = load_file(export(model, tmp_path / "hf") / "model.safetensors")
    meta = write_meta_folder(state, model.config, tmp_path / "meta", 2)
    with pytest.raises(ConfigError, match=r"model\.norm_eps: 0\.001, but .*params\.json says 1e-05"):
        loaded(meta, small(norm_eps=1e-3))


def test_rope_scaling_that_would_be_ignored_is_refused(tmp_path):
    folder = export(model_of(small()), tmp_path)
    content = json.loads((folder / "config.json").read_text())
    content["rope_scaling"] = {"rope_type": "yarn", "factor": 8.0}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="rope_type=yarn"):
        loaded(folder, small())


def test_another_architecture_names_the_first_tensor_both_shapes_and_the_count(tmp_path):
    folder = export(model_of(small()), tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError) as caught:
        loaded(folder, small(n_kv_heads=2, n_layers=3))
    assert "model.layers.0.self_attn.k_proj.weight is (32, 64)" in caught.value.problem
    assert "blocks.0.attention.k_proj.weight is (16, 64)" in caught.value.problem
    assert "30 tensors 4 differ in shape, 9 are absent; 0 are left over" in caught.value.problem


def test_layers_that_the_model_lacks_are_not_dropped_silently(tmp_path):
    folder = export(model_of(small()), tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.layers\.1\..* has no place in the model.* 9 are left over"):
        loaded(folder, small(n_layers=1))


def test_a_folder_that_does_not_fit_leaves_the_model_untouched(tmp_path):
    folder = export(model_of(small(), seed=1), tmp_path)
    (folder / "config.json").unlink()
    model = model_of(small(n_layers=3))
    with pytest.raises(ConfigError):
        load_weights(model, folder)
    assert_same_bits(model, model_of(small(n_layers=3)))


# ---- damaged folders


@pytest.fixture
def sharded(tmp_path):
    return export(model_of(small()), tmp_path, max_shard_bytes=20_000)


def test_an_absent_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(ConfigError, match=shard.name):
        loaded(sharded, small())


@pytest.mark.parametrize("target", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", ".."])
def test_an_index_cannot_point_out_of_its_folder(sharded, target):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = target
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="not a safetensors file of that folder"):
        loaded(sharded, small())


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": [1]}', "{}"])
def test_a_damaged_index_is_named(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"index\.json is not an index"):
        loaded(sharded, small())


@pytest.mark.parametrize("file", ["model.safetensors", "consolidated.00.pth"])
def test_a_git_lfs_pointer_is_called_one_with_its_size(tmp_path, file):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9976576152\n"
    (tmp_path / file).write_text(pointer)
    with pytest.raises(ConfigError, match=rf"git-LFS pointer of {len(pointer)} bytes.*9,976,576,152"):
        loaded(tmp_path, small())


def test_a_corrupt_safetensors_header_names_file_and_reason(tmp_path):
    path = export(model_of(small()), tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"}" + path.read_bytes()[9:])
    with pytest.raises(ConfigError, match=r"model\.safetensors .*not a readable safetensors file: .*header"):
        loaded(tmp_path, small())


def test_a_truncated_safetensors_file_is_named(tmp_path):
    path = export(model_of(small()), tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors \(\d+ bytes\) is not a readable"):
        loaded(tmp_path, small())


def test_a_truncated_meta_shard_is_named(tmp_path):
    (tmp_path / "consolidated.00.pth").write_bytes(b"PK\x03\x04 not a checkpoint, whatever its first bytes say")
    with pytest.raises(ConfigError, match=r"consolidated\.00\.pth .*cannot be read"):
        loaded(tmp_path, small())


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({"weight": pytest.fail}, tmp_path / "consolidated.00.pth")
    with pytest.raises(ConfigError, match=r"consolidated\.00\.pth .*cannot be read"):
        loaded(tmp_path, small())


def test_a_gap_in_the_meta_shards_is_named(tmp_path):
    state = load_file(export(model_of(small()), tmp_path / "hf") / "model.safetensors")
    meta = write_meta_folder(state, small(), tmp_path / "meta", 4)
    (meta / "consolidated.01.pth").unlink()
    with pytest.raises(ConfigError, match=r"lacks consolidated\.01\.pth"):
        loaded(meta, small())


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"no model\.safetensors.*it holds pytorch_model\.bin"):
        loaded(tmp_path, small())


# ---- finding the folder


def test_a_local_folder_is_itself(tmp_path):
    assert resolve_checkpoint(str(tmp_path)) == tmp_path


def test_a_path_that_is_no_folder_is_not_asked_of_the_hub(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        resolve_checkpoint(str(tmp_path / "nowhere"))


def test_a_hub_id_out_of_reach_says_how_to_give_a_path(tmp_path, monkeypatch):
    import huggingface_hub

    def no_network(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    with pytest.raises(ConfigError) as caught:
        resolve_checkpoint("no-such-group/no-such-model")
    assert caught.value.key == "model.checkpoint"
    assert "no-such-group/no-such-model" in caught.value.problem
    assert "Name or service not known" in caught.value.problem
    assert caught.value.fix == "model.checkpoint=/path/to/folder"
