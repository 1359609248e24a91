"""``model=hf``: families that are not built here, behind the same interface, against transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ftlab.distributed.activation import checkpoint_activations
from ftlab.errors import ConfigError
from ftlab.losses import CrossEntropy
from ftlab.models.auto import AutoModelConfig, find_model
from ftlab.models.hf import HFModel, HFTransformer
from ftlab.models.weights import export_weights, load_weights
from ftlab.training.generate import generate

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
# Biases and LayerNorm, scores and logits capped, fused projections, learned positions with a tied head.
KINDS: dict[str, dict[str, Any]] = {
    "gpt_neox": SIZES,
    "gemma2": SIZES | {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.5, "sliding_window": 5},
    "phi3": SIZES,
    "qwen3": SIZES,
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
LOSS = CrossEntropy(label_smoothing=0.0, z_loss=0.0)


def saved(kind: str, folder: Path, **changes: Any) -> Any:
    """transformers' model of that kind with random weights, saved into ``folder``."""
    torch.manual_seed(0)
    attention = "eager" if kind == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **KINDS[kind] | changes), attn_implementation=attention
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(folder)
    return model


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> HFTransformer:
    """As a run makes it: on meta, in its dtype, given memory, filled."""
    config, _ = find_model(HFModel(checkpoint=str(folder)))
    with torch.device("meta"):
        model = config.build().to(dtype)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    load_weights(model, folder)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients_are_those_of_transformers(kind, tmp_path, tokens):
    theirs = saved(kind, tmp_path)
    model = loaded(tmp_path)
    expected = theirs(tokens).logits
    assert torch.equal(model(tokens), expected)

    model.train()  # no dropout, though GPT-2's config asks for it
    loss = model(tokens, tokens, LOSS)
    loss.backward()
    expected_loss = F.cross_entropy(expected.flatten(0, 1), tokens.flatten(), reduction="sum")
    expected_loss.backward()
    assert torch.equal(loss, expected_loss)
    gradients = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name.removeprefix("model.")].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_and_ties_survive_the_way_from_meta_in_bfloat16(kind, tmp_path):
    theirs = dict(saved(kind, tmp_path).named_buffers())
    model = loaded(tmp_path, torch.bfloat16)
    for name, buffer in model.model.named_buffers():
        assert torch.equal(buffer, theirs[name]), name
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    head, embedding = model.model.get_output_embeddings(), model.model.get_input_embeddings()
    assert (head.weight is embedding.weight) == model.config.theirs.tie_word_embeddings


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_bitwise_the_checkpoint_and_keeps_its_config(kind, tmp_path, tokens):
    theirs = saved(kind, tmp_path / "theirs")
    export_weights(loaded(tmp_path / "theirs"), tmp_path / "ours", dtype=torch.float32, bos_id=1, eos_id=2, pad_id=None)
    opened, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation=theirs.config._attn_implementation
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(opened(tokens).logits, theirs(tokens).logits)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert {k: v for k, v in after.items() if "_token_id" not in k} == {
        k: v for k, v in before.items() if "_token_id" not in k
    }
    again = loaded(tmp_path / "ours")
    for (name, parameter), other in zip(
        loaded(tmp_path / "theirs").named_parameters(), again.parameters(), strict=True
    ):
        assert torch.equal(parameter, other), name


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_exact_and_blocks_are_found(kind, tmp_path):
    theirs = saved(kind, tmp_path)
    config = HFModel(checkpoint=str(tmp_path)).read(tmp_path)
    assert config.n_params() == sum(parameter.numel() for parameter in theirs.parameters())
    embeddings = {id(m.weight): m.weight for m in theirs.modules() if isinstance(m, torch.nn.Embedding)}
    embeddings.pop(id(theirs.get_output_embeddings().weight), None)
    matrices = sum(p.numel() for p in theirs.parameters() if p.ndim > 1 and id(p) not in embeddings)
    assert config.n_matmul_params() == matrices
    assert len(config.build().blocks) == config.n_layers == 2
    assert config.max_seq_len == 64


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_blocks_give_the_same_gradients(kind, mode, tmp_path, tokens):
    saved(kind, tmp_path)
    found = []
    for recompute in ("none", mode):
        model = loaded(tmp_path).train()
        checkpoint_activations(model, recompute)
        model(tokens, tokens, LOSS).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_transformers(kind, tmp_path):
    theirs = saved(kind, tmp_path)
    prompts = [[5, 6, 7], [9], [11, 12, 13]]
    ours = generate(
        loaded(tmp_path), prompts, max_new_tokens=12, end_ids=[60], temperature=0.0, top_p=1.0, seed=0
    )  # fmt: skip
    for prompt, answer in zip(prompts, ours, strict=True):
        text = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=60, pad_token_id=0
        )
        expected = text[0, len(prompt) :].tolist()
        assert answer == (expected[: expected.index(60)] if 60 in expected else expected)


def test_weights_of_tokens_multiply_their_losses(tmp_path, tokens):
    saved("gpt_neox", tmp_path)
    model, weights = loaded(tmp_path), torch.rand(tokens.shape)
    log_p = model(tokens).double().log_softmax(-1)
    expected = -(log_p.gather(2, tokens[..., None])[..., 0] * weights).sum()
    torch.testing.assert_close(model(tokens, tokens, LOSS, weights=weights).double(), expected, rtol=1e-6, atol=0)


# ---- refusals


def test_packed_rows_are_refused(tmp_path, tokens):
    saved("gpt_neox", tmp_path)
    with pytest.raises(ConfigError, match="does not keep packed documents apart"):
        loaded(tmp_path)(tokens, tokens, LOSS, doc_ids=torch.zeros_like(tokens))


def test_auto_refuses_them_by_name_and_points_here(tmp_path):
    saved("gpt_neox", tmp_path)
    with pytest.raises(ConfigError, match=r"describes GPTNeoXForCausalLM") as caught:
        AutoModelConfig(checkpoint=str(tmp_path)).read(tmp_path)
    assert caught.value.fix == f"model=hf model.checkpoint={tmp_path}"


def test_code_beside_the_weights_never_runs(tmp_path):
    saved("gpt_neox", tmp_path)
    canary = tmp_path / "ran"
    (tmp_path / "modeling.py").write_text(f"open({str(canary)!r}, 'w')\n")
    content = json.loads((tmp_path / "config.json").read_text())
    content |= {"model_type": "mine", "auto_map": {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="transformers cannot build"):
        HFModel(checkpoint=str(tmp_path)).read(tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize("model_type", ["t5", "nonsense"])
def test_what_is_no_causal_model_is_refused_by_name(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": ["T5ForNothing"]}))
    with pytest.raises(ConfigError, match=r"T5ForNothing|nonsense"):
        HFModel(checkpoint=str(tmp_path)).read(tmp_path)


@pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"num_attention_heads": None}])
def test_a_config_that_transformers_cannot_use_is_refused(change, tmp_path):
    saved("phi3", tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError):
        find_model(HFModel(checkpoint=str(tmp_path)))[0].build()


def test_a_tensor_of_another_model_is_refused(tmp_path):
    saved("gpt_neox", tmp_path)
    config = HFModel(checkpoint=str(tmp_path)).read(tmp_path)
    model = config.build()
    saved("phi3", tmp_path)
    with pytest.raises(ConfigError, match="holds another architecture"):
        load_weights(model, tmp_path)
