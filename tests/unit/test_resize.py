"""The vocabulary of tokenizer and model: what fits, what grows, and by which rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.errors import ConfigError
from ftlab.models.layouts import open_folder
from ftlab.models.resize import compare_specials, end_ids, fit_vocabulary, with_new_rows
from ftlab.models.weights import export_weights, load_weights
from tests.loop.conftest import MODEL


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory) -> Path:
    """Weights of ``MODEL``, 101 rows of vocabulary."""
    folder = tmp_path_factory.mktemp("weights")
    model = MODEL.replace(tie_embeddings=request.param).build()
    model.init_weights(seed=0)
    export_weights(model, folder, dtype=torch.float32, bos_id=1, eos_id=2, pad_id=None)
    return folder


def loaded(folder: Path, n_rows: int, new_ids: range):
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    model = MODEL.replace(vocab_size=n_rows, tie_embeddings=tied).build()
    load_weights(model, folder, new_ids)
    return model


def matrices(model) -> list[torch.Tensor]:
    return [p.detach() for name, p in model.named_parameters() if name in ("embedding.weight", "head.weight")]


@pytest.mark.parametrize(
    ("n_rows", "new_ids"),
    [(104, range(101, 104)), (101, range(95, 99)), (105, range(97, 105))],
    ids=["beyond the rows", "within padding", "both"],
)
def test_new_rows_are_the_mean_of_the_known_and_all_others_stay(folder, n_rows, new_ids):
    before, after = matrices(loaded(folder, 101, range(0))), matrices(loaded(folder, n_rows, new_ids))
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert new.shape == (n_rows, old.shape[1])
        mean = old[: new_ids.start].double().mean(dim=0).float()
        for i in range(n_rows):
            expected = mean if i in new_ids else old[i]
            torch.testing.assert_close(new[i], expected, rtol=0, atol=0 if i not in new_ids else 1e-7)


def test_any_rows_are_read_as_from_the_whole(folder):
    layout = open_folder(folder, MODEL)
    grown = with_new_rows(layout, range(97, 106), 106).tensors["model.embed_tokens.weight"]
    whole = grown.read(slice(0, 106))

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 106), st.integers(0, 106))
    def equal(start, stop):
        if start < stop:
            assert torch.equal(grown.read(slice(start, stop)), whole[start:stop])

    equal()


def test_a_grown_model_opens_in_transformers_with_its_new_size(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = loaded(folder, 104, range(101, 104))
    export_weights(model, tmp_path, dtype=torch.float32, bos_id=1, eos_id=2, pad_id=None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.vocab_size == 104
    tokens = torch.tensor([[1, 101, 103, 7]])
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ what fits

PRETRAINED = MODEL.replace(checkpoint="some/model", vocab_size=32000)


def test_random_weights_take_the_size_of_the_tokenizer_or_a_larger_one():
    assert fit_vocabulary(PRETRAINED.replace(vocab_size=None), None, 259, range(0)).vocab_size == 259
    assert fit_vocabulary(PRETRAINED, None, 259, range(0)).vocab_size == 32000
    assert fit_vocabulary(PRETRAINED, None, 32002, range(32000, 32002)).vocab_size == 32002
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 32000 is fewer than the 32001 tokens"):
        fit_vocabulary(PRETRAINED, None, 32001, range(0))


@pytest.mark.parametrize("n_ids", [32000, 31000])  # Qwen and Phi pad their vocabularies
def test_more_rows_than_ids_are_normal(folder, n_ids):
    assert fit_vocabulary(PRETRAINED, folder, n_ids, range(0)) == PRETRAINED


@pytest.mark.parametrize("n_ids", [32001, 259])
def test_a_tokenizer_of_another_size_is_refused_with_both_numbers(folder, n_ids):
    with pytest.raises(ConfigError, match=rf"it has {n_ids} tokens, but the model of some/model has 32000"):
        fit_vocabulary(PRETRAINED, folder, n_ids, range(0))


def test_rows_grow_for_added_tokens_only(folder):
    assert fit_vocabulary(PRETRAINED, folder, 32002, range(32000, 32002)).vocab_size == 32002
    assert fit_vocabulary(PRETRAINED, folder, 31002, range(31000, 31002)).vocab_size == 32000, "padding had room"
    with pytest.raises(ConfigError, match="32100 tokens"):
        fit_vocabulary(PRETRAINED, folder, 32102, range(32100, 32102))


def test_rows_that_the_configuration_leaves_open_are_those_of_the_folder(folder):
    assert fit_vocabulary(PRETRAINED.replace(vocab_size=None), folder, 99, range(0)).vocab_size == 101


@pytest.mark.parametrize(
    ("bos", "eos", "warned"),
    [(1, 2, []), (1, 99, ["eos is 99 in the tokenizer, but 2 in"]), (None, 2, []), (5, 2, ["bos is 5"])],
)
def test_a_differing_bos_or_eos_is_warned_of_with_both_numbers(folder, bos, eos, warned):
    found = compare_specials(folder, bos, eos)
    assert len(found) == len(warned)
    assert all(text.startswith(part) for text, part in zip(found, warned, strict=True))


def test_bos_and_eos_both_different_are_another_models_tokenizer(folder):
    with pytest.raises(ConfigError, match=r"bos is 5 in the tokenizer, but 1 in .*; eos is 9 in the tokenizer, but 2"):
        compare_specials(folder, 5, 9)


def test_any_of_several_eos_ids_will_do(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": [7, 8], "bos_token_id": null}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert [compare_specials(tmp_path, 1, eos) for eos in (7, 8, 9)] == [[], [], []]
    assert compare_specials(tmp_path, 1, 6) != []


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": [7, 5, 3]}, [3, 7, 5]),
        ({"eos_token_id": [5, 6]}, {}, [3, 5, 6]),
        ({"eos_token_id": 3}, None, [3]),
        ({}, {"eos_token_id": None}, [3]),
    ],
)
def test_an_answer_ends_at_the_tokenizer_s_eos_and_at_what_the_folder_names(config, generation, ends, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_ids(tmp_path, 3) == ends
    assert end_ids(None, 3) == [3]
