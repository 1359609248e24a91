"""Whatever Hugging Face's ``tokenizers`` can run: ``tokenizer.json``, Llama 3's ranks, SentencePiece BPE models."""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from ftlab.data.tokenizers.base import TOKENIZER_CONFIG, TOKENIZER_JSON, save_for_transformers
from ftlab.data.tokenizers.chat import read_chat_template
from ftlab.data.tokenizers.files import KEY, MODEL_FILE, find_file, read_bytes, read_json_beside
from ftlab.data.tokenizers.ranks import SPECIAL_NAMES, is_rank_file, ranks_as_hf, read_ranks
from ftlab.data.tokenizers.sentencepiece_model import as_hf, parse_model, special_names
from ftlab.errors import ConfigError

log = logging.getLogger(__name__)

# What a text follows where it follows a special. Drawn anew in every process: data that spells it cannot exist yet.
_STAND_IN = AddedToken(f"\ue002{secrets.token_hex(8)}\ue003", normalized=False)


class HuggingFaceTokenizer:
    """A tokenizer of ``tokenizers``, with the specials that transformers would find for it.

    BOS and EOS are added here and nowhere else: exactly one where asked for, whatever the file's post-processor
    does. They are told by tokenizer_config.json or special_tokens_map.json, else by the ids in
    generation_config.json or config.json.

    Args:
        path: a ``tokenizer.json`` or ``tokenizer.model``, a folder that holds one (the first is preferred), or a
            Hub id. A ``tokenizer.model`` may be Llama 3's list of ranks or a SentencePiece BPE model.
        added_tokens: new tokens for the text of the rows, which becomes them wherever it spells them.
        added_special_tokens: new special tokens, which only templates can spell.

    Raises:
        ConfigError: if there is no such file, if it is damaged, or if it has no EOS.
    """

    def __init__(self, *, path: str | None, added_tokens: Sequence[str], added_special_tokens: Sequence[str]):
        file = find_file(path, (TOKENIZER_JSON, MODEL_FILE))
        self._hf, names = _open(file)
        self._config = _config_beside(file.parent)
        names |= _names_beside(self._hf, self._config, file.parent)
        _declare_specials(self._hf, self._config, names, file.parent)
        n_known = _n_ids(self._hf)
        self._hf.add_tokens([AddedToken(token, normalized=False) for token in added_tokens])
        self._hf.add_special_tokens([AddedToken(token, normalized=False) for token in added_special_tokens])
        self.vocab_size = _n_ids(self._hf)
        self.new_ids = range(n_known, self.vocab_size)
        ids = {key: i for key, name in names.items() if (i := self._hf.token_to_id(name)) is not None}
        if "eos_token" not in ids:
            raise ConfigError(
                KEY,
                f"{file} has no EOS: {TOKENIZER_CONFIG} beside it names no eos_token that it knows",
                f"a {TOKENIZER_CONFIG} there, with eos_token",
            )
        self.special_tokens = {key: names[key] for key in ids}
        self.eos_id: int = ids["eos_token"]
        self.bos_id: int | None = ids.get("bos_token")
        self.pad_id: int = ids.get("pad_token", 0)
        if ids.get("pad_token") == self.eos_id:
            log.info("pad is EOS (%d): harmless, padding is told by position and EOS is learned", self.eos_id)
        self.chat_template = read_chat_template(file.parent)
        self.fingerprint = hashlib.sha256(f"{self.bos_id} {self.eos_id} {self._hf.to_str()}".encode()).hexdigest()

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Token ids of ``text``; BOS and EOS only where asked for."""
        return self._framed(self._literal.encode(text, add_special_tokens=False).ids, bos, eos)

    def encode_batch(self, texts: Sequence[str], *, bos: bool, eos: bool) -> list[list[int]]:
        """``encode`` over many texts, on all cores."""
        encoded = self._literal.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._framed(one.ids, bos, eos) for one in encoded]

    def encode_after_special(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode_batch`` for texts that follow a special, before which some tokenizers put no space."""
        after = [_STAND_IN.content + text for text in texts]
        return [one.ids[1:] for one in self._literal.encode_batch_fast(after, add_special_tokens=False)]

    def encode_with_specials(self, text: str) -> list[int]:
        """Token ids of ``text``, in which specials are what they spell; nothing is added."""
        return self._hf.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; specials leave no trace in it."""
        return self._hf.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write what transformers opens with equal ids, added tokens included."""
        kept = {key: value for key, value in self._config.items() if key not in _NOT_EXPORTED}
        save_for_transformers(self._hf, folder, kept | self.special_tokens, self.chat_template)

    @cached_property
    def specials(self) -> dict[str, int]:
        """Id of every special token, by its text."""
        return {token.content: i for i, token in self._hf.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def strips_after(self) -> frozenset[str]:
        """Special tokens that swallow the spaces and newlines after them, as Phi-3's do."""
        added = self._hf.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special and token.rstrip)

    @cached_property
    def token_bytes(self) -> np.ndarray | None:
        """See ``Tokenizer``; known for tokens that are bytes, and for words whose spaces are shown as "▁"."""
        decoder = self._hf.decoder.__getstate__() if self._hf.decoder is not None else b""
        if b'"ByteLevel"' not in decoder and "▁".encode() not in decoder:
            return None
        of_word = len if b'"ByteLevel"' in decoder else _n_bytes_of_piece
        sizes = np.full(self.vocab_size, -1, dtype=np.int32)
        added = self._hf.get_added_tokens_decoder()
        for piece, i in self._hf.get_vocab(with_added_tokens=False).items():
            sizes[i] = of_word(piece)
        for i, token in added.items():
            sizes[i] = 0 if token.special else len(token.content.encode())
        return sizes

    def _framed(self, ids: list[int], bos: bool, eos: bool) -> list[int]:
        before = [self.bos_id] if bos and self.bos_id is not None else []
        return [*before, *ids, *([self.eos_id] if eos else [])]

    @cached_property
    def _literal(self) -> HFTokenizer:
        """The tokenizer to which specials are text like any other, but for the ``_STAND_IN``."""
        literal = HFTokenizer.from_str(self._hf.to_str())
        literal.encode_special_tokens = True
        for i, token in literal.get_added_tokens_decoder().items():
            if token.special and i in literal.encode(token.content, add_special_tokens=False).ids:
                raise ConfigError(
                    KEY, f"text can spell its special token {token.content!r} (a {type(literal.model).__name__} model)"
                )
        literal.add_tokens([_STAND_IN])
        return literal


# ------------------------------------------------------------------------------------------ opening the files

_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
# Said by tokenizer.json or chat_template.jinja already, or by what is written in their place.
_NOT_EXPORTED = {*_NAMES, "added_tokens_decoder", "auto_map", "chat_template", "tokenizer_class", "tokenizer_file"}


def _open(file: Path) -> tuple[HFTokenizer, dict[str, str]]:
    """The tokenizer in ``file``, and the names of those specials that the file itself tells."""
    content = read_bytes(file)
    if is_rank_file(content):
        return ranks_as_hf(read_ranks(content, file)), dict(SPECIAL_NAMES)
    if file.suffix == ".model":
        spec = parse_model(content, file)
        return as_hf(spec), special_names(spec)
    try:
        tokenizer = HFTokenizer.from_buffer(content)
    except Exception as error:  # the Rust library raises Exception itself
        raise ConfigError(
            KEY,
            f"{file} ({len(content)} bytes) is no tokenizer of Hugging Face's, or a truncated one: {error}",
            f"{KEY}=/path/to/a/complete/{TOKENIZER_JSON}",
        ) from error
    # What the last user of the file wanted for batches; here rows are cut and padded elsewhere.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, {}


def _config_beside(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; before it listed all added tokens, special_tokens_map.json had the last word."""
    config = read_json_beside(folder, TOKENIZER_CONFIG)
    if "added_tokens_decoder" not in config:
        config |= read_json_beside(folder, "special_tokens_map.json")
    return config


def _content(token: Any) -> str | None:
    """The text of a token that a JSON file holds, bare or with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _names_beside(tokenizer: HFTokenizer, config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The specials that the files beside a tokenizer tell: by name, else by id, of several the first."""
    names = {key: name for key in _NAMES if (name := _content(config.get(key))) is not None}
    # A tokenizer_config.json without bos_token means that there is none (Qwen), whatever config.json has for BOS.
    for key in ("eos_token",) if config else ("eos_token", "bos_token"):
        for file in ("generation_config.json", "config.json"):
            value = read_json_beside(folder, file).get(f"{key}_id") if key not in names else None
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, int) and (name := tokenizer.id_to_token(first)) is not None:
                names[key] = name
    return names


def _declare_specials(
    tokenizer: HFTokenizer, config: Mapping[str, Any], names: Mapping[str, str], folder: Path
) -> None:
    """Make special what the configuration calls so, though tokenizer.json does not; as transformers does."""
    known = tokenizer.get_added_tokens_decoder()
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    try:
        listed = {
            int(i): AddedToken(token["content"], **{flag: token.get(flag, False) for flag in flags})
            for i, token in (config.get("added_tokens_decoder") or {}).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"the added_tokens_decoder in {folder / TOKENIZER_CONFIG} holds no tokens by id: {error!r}"
        raise ConfigError(KEY, problem, f"{KEY}=/path/to/a/complete/tokenizer") from error
    for i, token in sorted(listed.items()):
        if i not in known or known[i].content != token.content or known[i].special != token.special:
            tokenizer.add_tokens([token])
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for name in names.values():
        if name not in special and tokenizer.token_to_id(name) is not None:
            tokenizer.add_special_tokens([AddedToken(name, normalized=False)])


def _n_bytes_of_piece(piece: str) -> int:
    return 1 if _BYTE_PIECE.fullmatch(piece) else len(piece.replace("▁", " ").encode())


def _n_ids(tokenizer: HFTokenizer) -> int:
    """One more than the largest id: not the count, which is less where there are gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
