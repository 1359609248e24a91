"""HuggingFaceTokenizer against transformers, on tokenizers of every family, and what damaged files say."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from ftlab.data.tokenizers import TINY_MODEL, HuggingFaceTokenizer, SentencePieceTokenizer
from ftlab.errors import ConfigError
from tests.unit.hf_tokenizers import KINDS, save_kind

transformers = pytest.importorskip("transformers")

SPELLED = ["<s>", "</s>", "<unk>", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|begin_of_text|>", "<think>"]
pieces = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(["the model", " ", "  ", "\n\n", "2024", "it's", "é", "é", "🙂", "▁", "<", ">", *SPELLED]),
)
texts = st.lists(pieces, max_size=8).map("".join)


def open_folder(folder: Path, **added: list[str]) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(**{"path": str(folder), "added_tokens": [], "added_special_tokens": [], **added})


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(our tokenizer, transformers', the folder) of one kind."""
    folder = save_kind(request.param, tmp_path_factory.mktemp(request.param))
    return open_folder(folder), transformers.AutoTokenizer.from_pretrained(folder), folder


def test_ids_equal_those_of_transformers_and_specials_in_text_stay_text(kind):
    ours, theirs, _ = kind
    special = {i for i, token in theirs.added_tokens_decoder.items() if token.special}

    @settings(max_examples=150, deadline=None)
    @given(text=texts)
    def equal(text):
        ids = ours.encode(text, bos=False, eos=False)
        assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert not special & set(ids) - {theirs.unk_token_id}
        assert ours.encode_with_specials(text) == theirs(text, add_special_tokens=False).input_ids
        assert ours.encode_batch([text, "x"], bos=True, eos=True)[0] == ours.encode(text, bos=True, eos=True)

    equal()


def test_bos_and_eos_are_transformers_own_and_come_once_whatever_the_post_processor_adds(kind):
    ours, theirs, _ = kind
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.pad_id == (theirs.pad_token_id or 0)
    bare = ours.encode("the model", bos=False, eos=False)
    bos = [ours.bos_id] if ours.bos_id is not None else []
    assert ours.encode("the model", bos=True, eos=True) == [*bos, *bare, ours.eos_id]
    assert ours.vocab_size == len(theirs)


def test_decoding_gives_the_text_back_without_specials(kind):
    ours, _, _ = kind
    for text in ("the model learns", "Zażółć 漢字 🙂 it's\n\n  def", "two  spaces "):
        assert ours.decode(ours.encode(text, bos=True, eos=True)) == text


def test_ids_that_are_nobody_s_have_no_text(kind):
    tokenizer = kind[0]
    ids = tokenizer.encode("the model", bos=False, eos=False)
    assert tokenizer.decode([*ids, tokenizer.vocab_size, 10**6]) == tokenizer.decode(ids)


def test_transformers_opens_the_saved_folder_with_equal_ids(kind, tmp_path):
    ours, before, _ = kind
    ours.save(tmp_path)
    after = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert after.special_tokens_map == before.special_tokens_map
    assert after.chat_template == before.chat_template

    @settings(max_examples=100, deadline=None)
    @given(text=texts)
    def equal(text):
        assert after(text).input_ids == before(text).input_ids
        plain = after(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert plain == ours.encode(text, bos=False, eos=False)

    equal()
    assert open_folder(tmp_path).fingerprint == ours.fingerprint


def test_saved_added_tokens_have_the_ids_that_training_gave_them(kind, tmp_path):
    _, _, folder = kind
    ours = open_folder(folder, added_tokens=["<gene>", "the model"], added_special_tokens=["<|call|>"])
    known = ours.vocab_size - 3
    assert ours.new_ids == range(known, known + 3)
    text = "the model <gene><|call|> x"
    ids = ours.encode(text, bos=False, eos=False)
    assert known in ids, "an added token is found in text"
    assert known + 1 in ids
    assert known + 2 not in ids, "a special one is not"
    assert known + 2 in ours.encode_with_specials(text)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocab_size
    assert theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids == ids
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode_with_specials(text)
    again = open_folder(tmp_path, added_tokens=["<gene>", "the model"], added_special_tokens=["<|call|>"])
    assert again.new_ids == range(known + 3, known + 3), "what the files hold already is not new"
    assert again.fingerprint == ours.fingerprint


def test_a_text_is_cut_and_padded_by_nobody_but_us(kind, tmp_path):
    _, _, folder = kind
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=64)
    shutil.copytree(folder, tmp_path / "t")
    tokenizer.save(str(tmp_path / "t" / "tokenizer.json"))
    assert len(open_folder(tmp_path / "t").encode("the model learns from text", bos=False, eos=False)) > 4
    assert open_folder(tmp_path / "t").encode("the", bos=False, eos=False) == kind[0].encode(
        "the", bos=False, eos=False
    )


@pytest.mark.parametrize("name", ["tiny", "llama2"])
def test_a_sentencepiece_model_opens_here_too_with_the_same_ids(name, request, tmp_path):
    source = request.getfixturevalue("shared_data") / "llama2_tokenizer.model" if name == "llama2" else TINY_MODEL
    shutil.copy(source, tmp_path / "tokenizer.model")
    ours, reference = open_folder(tmp_path), SentencePieceTokenizer(path=str(source))
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (
        reference.vocab_size,
        reference.bos_id,
        reference.eos_id,
        reference.pad_id,
    )

    @settings(max_examples=100, deadline=None)
    @given(text=st.lists(pieces, max_size=8).map("".join).filter(lambda text: "\0" not in text))
    def equal(text):
        assert ours.encode(text, bos=True, eos=True) == reference.encode(text, bos=True, eos=True)
        assert ours.encode_with_specials(text) == reference.encode_with_specials(text)

    equal()


# -------------------------------------------------------------------------------------------- which files


def test_specials_are_found_wherever_transformers_keeps_them(kind, tmp_path):
    ours, theirs, folder = kind
    names = {key: str(value) for key, value in theirs.special_tokens_map.items()}
    shutil.copy(folder / "tokenizer.json", tmp_path)
    with_flags = {key: {"content": name, "lstrip": False} for key, name in names.items()}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(with_flags))
    found = open_folder(tmp_path)
    assert (found.bos_id, found.eos_id, found.pad_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    (tmp_path / "special_tokens_map.json").unlink()
    ids = {"eos_token_id": [ours.eos_id, 0], "bos_token_id": ours.bos_id}
    (tmp_path / "generation_config.json").write_text(json.dumps(ids))
    found = open_folder(tmp_path)
    assert (found.bos_id, found.eos_id) == (ours.bos_id, ours.eos_id)


def test_a_folder_without_any_tokenizer_says_which_files_are_expected(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for open_it in (open_folder, lambda folder: SentencePieceTokenizer(path=str(folder))):
        with pytest.raises(ConfigError, match=r"holds no .*tokenizer\.model; it holds config\.json") as caught:
            open_it(tmp_path)
        assert caught.value.key == "tokenizer.path"
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json or tokenizer\.model"):
        open_folder(tmp_path)


def test_a_folder_with_the_other_kind_only_says_which_option_reads_it(kind):
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.model, but tokenizer\.json") as caught:
        SentencePieceTokenizer(path=str(kind[2]))
    assert caught.value.fix == "tokenizer=huggingface"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named_with_its_size(kind, tmp_path, share):
    whole = (kind[2] / "tokenizer.json").read_bytes()
    cut = whole[: int(len(whole) * share)]
    (tmp_path / "tokenizer.json").write_bytes(cut)
    with pytest.raises(ConfigError, match=rf"tokenizer\.json \({len(cut)} bytes\).*truncated") as caught:
        open_folder(tmp_path)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_truncated_file_beside_it_is_named_too(kind, tmp_path):
    shutil.copytree(kind[2], tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text('{"eos_tok')
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json \(9 bytes\) is no JSON, or truncated"):
        open_folder(tmp_path / "t")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("chat_template.jinja", b'{{ "\xff" }}', r"chat_template\.jinja is no UTF-8"),
        ("tokenizer_config.json", b'{"chat_template": 5}', r"chat_template in .*tokenizer_config\.json is neither"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "is neither text nor a list of objects"),
        ("tokenizer_config.json", b'{"chat_template": ["x"]}', "is neither text nor a list of objects"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}', r"added_tokens_decoder in .*_config\.json"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"7": "x"}}', "holds no tokens by id"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"7": {"content": 1}}}', "holds no tokens by id"),
    ],
)
def test_a_file_beside_it_that_holds_something_else_is_named(name, content, said, tmp_path):
    folder = save_kind("qwen", tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if name.endswith(".json"):
        content = json.dumps({**config, **json.loads(content)}).encode()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        open_folder(folder)


def test_a_git_lfs_pointer_is_told_from_a_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9085657\n")
    with pytest.raises(ConfigError, match="git-LFS pointer of 69 bytes") as caught:
        open_folder(tmp_path)
    assert caught.value.fix.endswith("lfs pull")


def test_a_tokenizer_without_eos_is_refused(kind, tmp_path):
    shutil.copy(kind[2] / "tokenizer.json", tmp_path)
    with pytest.raises(ConfigError, match="has no EOS"):
        open_folder(tmp_path)


def test_a_model_whose_text_can_spell_a_special_is_refused(tmp_path):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[END]": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["[END]"])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "[END]"}')
    with pytest.raises(ConfigError, match=r"text can spell its special token '\[END\]'"):
        open_folder(tmp_path).encode("a", bos=False, eos=False)


def test_pad_that_is_eos_is_explained_and_eos_is_still_learned(kind, caplog):
    from ftlab import IGNORE_INDEX
    from ftlab.data.batch import Sample, collate

    with caplog.at_level(logging.INFO):
        ours = open_folder(kind[2])
    if ours.pad_id != ours.eos_id:
        assert "pad is EOS" not in caplog.text
        return
    assert "padding is told by position" in caplog.text
    import numpy as np

    rows = [np.array(ours.encode(text, bos=True, eos=True), dtype=np.int32) for text in ("the", "the model learns")]
    batch = collate([Sample(row, np.ones(len(row), dtype=bool), i) for i, row in enumerate(rows)], ours.pad_id)
    n = len(rows[0])
    assert batch.targets[0, n - 2] == ours.eos_id
    assert (batch.targets[0, n - 1 :] == IGNORE_INDEX).all()


# ------------------------------------------------------------------------------- what the data's masks need


def test_every_special_is_listed_with_its_id(kind):
    ours, theirs, _ = kind
    special = {token.content: i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert dict(ours.specials) == special


def test_bytes_of_tokens_add_up_to_those_of_the_text(kind):
    ours, _, _ = kind
    assert ours.token_bytes.shape == (ours.vocab_size,)
    for text in ("the model learns", "Zażółć 漢字 🙂 it's\n\n  def", "12345"):
        sizes = ours.token_bytes[ours.encode(text, bos=True, eos=True)]
        assert sizes.sum() - len(text.encode()) in (0, 1), "1: the space that is put before the first word"


def test_text_after_a_special_is_encoded_as_transformers_does_it_there(kind):
    ours, theirs, _ = kind
    special = next(iter(ours.specials))
    rows = ["the model", " two  spaces", "\n\nx", "漢字"]
    expected = [theirs(special + row, add_special_tokens=False).input_ids[1:] for row in rows]
    assert ours.encode_after_special(rows) == expected
