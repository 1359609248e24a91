"""Tokenizers: ids, round trips, saved folders, and what a wrong path says."""

import io
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from ftlab.data.build_tiny_tokenizer import train_model
from ftlab.data.templates import AlpacaTemplate
from ftlab.data.tokenizers import TINY_MODEL, ByteTokenizer, SentencePieceTokenizer
from ftlab.data.tokenizers.heads import shared_heads
from ftlab.data.tokenizers.sentencepiece_model import parts_lines
from ftlab.errors import ConfigError

# NUL ends a string inside SentencePiece, "▁" is its own sign for a space; "<" could spell a special token, which
# Hugging Face reads as one.
plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<▁"), max_size=60)


@pytest.fixture(scope="module", params=["byte", "tiny", "llama2"])
def tokenizer(request):
    if request.param == "byte":
        return ByteTokenizer()
    if request.param == "tiny":
        return SentencePieceTokenizer(path="tiny")
    return request.getfixturevalue("llama2")


@pytest.fixture(scope="module")
def llama2(shared_data):
    return SentencePieceTokenizer(path=str(shared_data / "llama2_tokenizer.model"))


@settings(max_examples=50, deadline=None)
@given(text=plain_text)
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


def test_ids_that_are_nobody_s_have_no_text(tokenizer):
    ids = tokenizer.encode("a b", bos=False, eos=False)
    assert tokenizer.decode([*ids, tokenizer.vocab_size, 10**6]) == "a b"


def test_bos_and_eos_come_only_where_asked_for(tokenizer):
    bare = tokenizer.encode("a b", bos=False, eos=False)
    assert tokenizer.bos_id not in bare
    assert tokenizer.eos_id not in bare
    assert tokenizer.encode("a b", bos=True, eos=False) == [tokenizer.bos_id, *bare]
    assert tokenizer.encode("a b", bos=False, eos=True) == [*bare, tokenizer.eos_id]


def test_a_batch_is_encoded_as_its_texts_are(tokenizer):
    texts = ["", " two  spaces", "naïve 😀\n\ttab", "12345"]
    assert tokenizer.encode_batch(texts, bos=True, eos=True) == [
        tokenizer.encode(text, bos=True, eos=True) for text in texts
    ]


beginnings = st.lists(
    st.text(alphabet="ab ▁\n\t#ż😀", min_size=20, max_size=60).map(lambda text: text + "\n"), min_size=1, max_size=3
)


@settings(max_examples=60, deadline=None)
@given(heads=beginnings, tails=st.lists(st.text(alphabet="ab ▁\n:'é😀") | plain_text, min_size=8, max_size=40))
def test_texts_that_begin_alike_have_the_tokens_that_each_has_alone(tokenizer, heads, tails):
    texts = [heads[i % len(heads)] + tail for i, tail in enumerate(tails)]
    together = tokenizer.encode_batch(texts, bos=False, eos=False)
    assert together == [tokenizer.encode(text, bos=False, eos=False) for text in texts]


def test_common_beginnings_are_found_and_end_with_a_line_feed():
    head, other = "The same words in each.\n\n### Instruction:\n", "Quite another beginning:\n"
    texts = [(head if i % 3 else other) + f"{i}\nanswer" for i in range(300)]
    assert shared_heads(texts) == [head, other]
    assert shared_heads([f"{i}{head}" for i in range(300)]) == []
    assert shared_heads([]) == []
    assert shared_heads(["\0" + text for text in texts]) == [], "NUL ends a text inside SentencePiece"


def test_a_vocabulary_that_joins_line_feeds_is_not_cut_at_them():
    spec = sentencepiece_model_pb2.ModelProto.FromString(TINY_MODEL.read_bytes())
    assert parts_lines(spec)
    spec.pieces[300].piece = "a\n"
    assert not parts_lines(spec)
    spec.pieces[300].piece, spec.trainer_spec.byte_fallback = "a", False
    assert not parts_lines(spec)
    spec.trainer_spec.byte_fallback, spec.normalizer_spec.remove_extra_whitespaces = True, True
    assert not parts_lines(spec)


def test_text_that_spells_eos_does_not_become_eos(tokenizer):
    assert tokenizer.eos_id not in tokenizer.encode("stop </s> here", bos=True, eos=False)


def test_every_id_is_below_vocab_size_and_padding_has_a_valid_one(tokenizer):
    ids = tokenizer.encode("Zażółć gęślą 😀 0123456789", bos=True, eos=True)
    assert max(ids) < tokenizer.vocab_size
    assert 0 <= tokenizer.pad_id < tokenizer.vocab_size


def test_transformers_opens_the_saved_folder_with_equal_ids(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.vocab_size,
    )

    @settings(max_examples=100, deadline=None)
    @given(text=plain_text)
    def equal(text):
        ids = tokenizer.encode(text, bos=True, eos=False)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text

    equal()
    for text in (" ", "  a", "a    b", "\n a", "x\n    return  y"):  # runs of spaces are where converters slip
        assert theirs(text).input_ids == tokenizer.encode(text, bos=True, eos=False)


def test_a_saved_folder_reopens_as_the_same_tokenizer(tmp_path):
    tiny = SentencePieceTokenizer(path="tiny")
    tiny.save(tmp_path)
    assert SentencePieceTokenizer(path=str(tmp_path)).fingerprint == tiny.fingerprint


def test_llama2_has_its_known_specials_and_no_pad_piece(llama2):
    assert (llama2.vocab_size, llama2.bos_id, llama2.eos_id, llama2.pad_id) == (32000, 1, 2, 0)


def test_ids_of_all_999_real_rows_equal_those_of_transformers_llama_tokenizer(llama2, shared_data):
    transformers = pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import SentencePieceExtractor, generate_merges

    # Merges ranked by score, as in the tokenizer.json that Meta's models have on the Hub. Left to itself,
    # transformers 5 ranks the merges of a bare tokenizer.model by id, and splits runs of spaces differently.
    pieces = SentencePieceExtractor(str(shared_data / "llama2_tokenizer.model")).proto.pieces
    vocab = {piece.piece: i for i, piece in enumerate(pieces)}
    merges = generate_merges(vocab, [(piece.piece, piece.score) for piece in pieces])
    theirs = transformers.LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    template = AlpacaTemplate()
    texts = [template.render(row["instruction"], row["input"]) + row["output"] for row in rows]
    assert theirs(texts).input_ids == llama2.encode_batch(texts, bos=True, eos=False)


def test_the_packaged_model_is_what_its_script_builds():
    built = sentencepiece.SentencePieceProcessor(model_proto=train_model())
    packaged = sentencepiece.SentencePieceProcessor(model_file=str(TINY_MODEL))
    assert [built.id_to_piece(i) for i in range(len(built))] == [packaged.id_to_piece(i) for i in range(len(packaged))]


def test_two_models_have_different_fingerprints():
    assert SentencePieceTokenizer(path="tiny").fingerprint != ByteTokenizer().fingerprint


@pytest.mark.parametrize("content", [b"", b"no model at all" * 50, TINY_MODEL.read_bytes()[:3000]])
def test_a_broken_model_file_is_named_with_its_size(tmp_path, content):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"tokenizer\.model \({len(content)} bytes\).*truncated") as caught:
        SentencePieceTokenizer(path=str(file))
    assert caught.value.key == "tokenizer.path"


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        (None, "is null and so is model.checkpoint"),
        ("/nowhere/tokenizer.model", r"/nowhere/tokenizer\.model does not exist; expected .*tokenizer\.model"),
        (".", r"holds no tokenizer\.model"),
    ],
)
def test_a_missing_model_says_which_file_is_expected_and_which_key_to_set(path, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=problem) as caught:
        SentencePieceTokenizer(path=path)
    assert str(caught.value).startswith("tokenizer.path: ")
    assert "tokenizer.path=/path/to/tokenizer.model" in caught.value.fix


def test_an_unreachable_hub_names_the_repository_and_a_local_way(monkeypatch):
    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    with pytest.raises(ConfigError, match=r"meta-llama/Llama-2-7b-nowhere.*Name or service not known") as caught:
        SentencePieceTokenizer(path="meta-llama/Llama-2-7b-nowhere")
    assert "tokenizer.path=" in caught.value.fix


def test_a_model_that_would_not_export_faithfully_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g"] * 50),
        model_writer=model,
        model_type="unigram",
        vocab_size=12,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file = tmp_path / "unigram.model"
    file.write_bytes(model.getvalue())
    with pytest.raises(ConfigError, match="it is not a BPE model"):
        SentencePieceTokenizer(path=str(file))
