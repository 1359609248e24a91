"""Llama 3's tokenizer.model against tiktoken, which it was made for."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from ftlab.data.encode import Encoder
from ftlab.data.formats import Conversation, Message
from ftlab.data.jinja_template import JinjaTemplate
from ftlab.data.tokenizers import TINY_MODEL, HuggingFaceTokenizer, SentencePieceTokenizer
from ftlab.data.tokenizers.byte import byte_level_alphabet
from ftlab.data.tokenizers.ranks import SPECIALS, SPLIT, is_rank_file
from ftlab.errors import ConfigError
from tests.unit.hf_tokenizers import corpus

tiktoken = pytest.importorskip("tiktoken")


def trained_ranks() -> dict[bytes, int]:
    """Ranks as byte-level training makes them: 256 bytes, then merges."""
    byte_of = {char: byte for byte, char in byte_level_alphabet().items()}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=list(byte_of), show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return {bytes(byte_of[char] for char in token): i for token, i in tokenizer.get_vocab().items()}


def any_ranks() -> dict[bytes, int]:
    """Ranks that no training would make: every way to cut a token is as good as another."""
    tokens = [bytes([byte]) for byte in range(256)]
    pool = [b"a", b"b", b" ", b"e"]
    for i in range(40):
        joined = pool[i * 7 % len(pool)] + pool[i * 5 % len(pool)]
        if joined not in tokens and len(joined) < 9:
            tokens.append(joined)
            pool.append(joined)
    return {token: rank for rank, token in enumerate(tokens)}


def write(ranks: dict[bytes, int]) -> bytes:
    lines = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in lines)


def open_folder(folder) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(path=str(folder), added_tokens=[], added_special_tokens=[])


@pytest.fixture(scope="module", params=[trained_ranks, any_ranks])
def pair(request, tmp_path_factory):
    ranks = request.param()
    folder = tmp_path_factory.mktemp("llama3")
    (folder / "tokenizer.model").write_bytes(write(ranks))
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    reference = tiktoken.Encoding("llama3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=specials)
    return open_folder(folder), reference, folder


def test_ids_equal_those_of_tiktoken(pair):
    ours, reference, _ = pair
    words = st.sampled_from(
        ["ab", "aab", " a", "e", "  ", "it's", "IT'S", "12345", "\n\n", "漢字", "🙂", *SPECIALS[:2]]
    )
    text = st.lists(st.text(max_size=6) | words, max_size=12).map("".join)

    @settings(max_examples=300, deadline=None)
    @given(text=text)
    def equal(text):
        assert ours.encode(text, bos=False, eos=False) == reference.encode_ordinary(text)
        assert ours.encode_with_specials(text) == reference.encode(text, allowed_special="all")
        assert ours.decode(ours.encode(text, bos=True, eos=True)) == text

    equal()


def test_specials_follow_the_ranks_as_in_llama3(pair):
    ours, reference, _ = pair
    n = len(reference._mergeable_ranks)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (n + 256, n, n + 1)
    assert [SPECIALS[i] for i in (2, 6, 7, 9)] == [
        "<|reserved_special_token_0|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    assert (len(set(SPECIALS)), SPECIALS[-1]) == (256, "<|reserved_special_token_247|>")


def test_transformers_opens_the_saved_folder_with_equal_ids(pair, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, _, _ = pair
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the model learns  ab aab", "it's 2024\n\n x", "漢字 🙂"):
        assert theirs(text).input_ids == ours.encode(text, bos=True, eos=False)


def test_a_rank_file_is_told_from_a_sentencepiece_model_by_its_content(pair):
    assert not is_rank_file(TINY_MODEL.read_bytes())
    with pytest.raises(ConfigError, match="list of ranks, as Llama 3 has it") as caught:
        SentencePieceTokenizer(path=str(pair[2]))
    assert caught.value.fix.startswith("tokenizer=huggingface")


@pytest.mark.parametrize("cut", [2, 9])
def test_a_truncated_rank_file_is_named_with_its_size(pair, tmp_path, cut):
    whole = (pair[2] / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[:-cut])
    with pytest.raises(ConfigError, match=rf"tokenizer\.model \({len(whole) - cut} bytes\) is no complete list"):
        open_folder(tmp_path)


def test_a_rank_file_takes_its_chat_template_from_the_files_beside_it(pair, tmp_path):
    ours, _, _ = pair
    (tmp_path / "tokenizer.model").write_bytes((pair[2] / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"eos_token": "<|eot_id|>", "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"}
        )
    )
    chat = open_folder(tmp_path)
    encoder = Encoder(tokenizer=chat, template=JinjaTemplate(path=None), train_on_input=False)
    row = encoder([encoder.render(Conversation([Message("user", "ab")]))])
    assert row.tokens.tolist() == [ours.bos_id, *ours.encode("ab", bos=False, eos=False), ours.bos_id + 9]
