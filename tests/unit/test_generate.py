"""Generation against transformers', and when and how it stops."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftlab.errors import ConfigError, DataError
from ftlab.models.hf_layout import hf_names
from ftlab.models.transformer import ModelConfig
from ftlab.training.generate import generate, sample

NEVER = -1  # no token has this id, so nothing ends a row early
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9], [7], [7, 9, 3]]


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=None, ffn_hidden_dim=48, vocab_size=61,
        norm_eps=1e-5, rope_theta=10000.0, max_seq_len=48, tie_embeddings=False, checkpoint=None,
        family="llama", sliding_window=None, rope_scaling=None,
    )  # fmt: skip
    model = config.build()
    model.init_weights(0)
    with torch.no_grad():  # near-uniform logits would make every comparison of argmaxes a coin toss
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return model


def answers(model, prompts=PROMPTS, **changes):
    options = {"max_new_tokens": 12, "end_ids": [NEVER], "temperature": 0.0, "top_p": 1.0, "seed": 0}
    return generate(model, prompts, **(options | changes))


def test_greedy_tokens_equal_those_of_transformers(model):
    config = model.config
    twin = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.dim, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads, intermediate_size=config.ffn_hidden_dim,
            vocab_size=config.vocab_size, rms_norm_eps=config.norm_eps, eos_token_id=None,
            max_position_embeddings=config.max_seq_len,
        )
    )  # fmt: skip
    names = hf_names(config)
    twin.load_state_dict({names[name]: parameter for name, parameter in model.state_dict().items()})
    for prompt, new_tokens in zip(PROMPTS, answers(model), strict=True):
        expected = twin.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert new_tokens == expected[0, len(prompt) :].tolist()


def test_an_answer_does_not_depend_on_the_prompts_beside_it(model):
    assert answers(model) == [answers(model, [prompt])[0] for prompt in PROMPTS]


def test_a_row_ends_before_eos_and_the_others_go_on(model):
    free = answers(model)
    eos_id = free[0][3]
    ended = answers(model, end_ids=[eos_id])
    for whole, cut in zip(free, ended, strict=True):
        assert cut == (whole[: whole.index(eos_id)] if eos_id in whole else whole)


def test_each_of_several_tokens_ends_a_row(model):
    free = answers(model)
    ends = {free[0][3], free[1][5]}
    for whole, cut in zip(free, answers(model, end_ids=ends), strict=True):
        at = next((i for i, token in enumerate(whole) if token in ends), len(whole))
        assert cut == whole[:at]


def test_generation_stops_at_the_model_s_last_position(model):
    [new_tokens] = answers(model, [[1] * 40], max_new_tokens=100)
    assert len(new_tokens) == 8


def test_tokens_stream_as_they_are_returned(model):
    streamed = [[] for _ in PROMPTS]
    result = answers(model, end_ids=[answers(model)[0][3]], on_token=lambda row, token: streamed[row].append(token))
    assert streamed == result


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored_even_after_an_error(model, training):
    def fail(row, token):
        raise RuntimeError("terminal closed")

    model.train(training)
    with pytest.raises(RuntimeError, match="terminal closed"):
        answers(model, on_token=fail)
    assert model.training == training


def test_the_same_seed_draws_the_same_tokens_and_another_does_not(model):
    first, again, other = (answers(model, temperature=1.5, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_sampling_leaves_the_global_random_state_alone(model):
    before = torch.get_rng_state()
    answers(model, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tiny_top_p_is_greedy(model):
    assert answers(model, temperature=1.0, top_p=1e-6) == answers(model)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().expand(2000, 4)
    drawn = sample(logits, temperature=1.0, top_p=0.65, generator=torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {1, 3}
    assert (drawn == 1).float().mean().item() == pytest.approx(4 / 7, abs=0.05)


def test_it_runs_under_the_caller_s_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [len(new_tokens) for new_tokens in answers(model)] == [12] * len(PROMPTS)


@pytest.mark.parametrize("prompt", [[], [1] * 49])
def test_a_prompt_the_model_cannot_read_is_named(model, prompt):
    with pytest.raises(DataError, match=f"prompt 1 has {len(prompt)} tokens"):
        answers(model, [[1], prompt])


@pytest.mark.parametrize(("option", "value"), [("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1)])
def test_sampling_options_out_of_range_are_refused(model, option, value):
    with pytest.raises(ConfigError, match=option):
        answers(model, **{option: value})
