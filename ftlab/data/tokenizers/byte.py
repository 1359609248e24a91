"""Plain bytes as tokens."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from ftlab.data.tokenizers.base import begin_with_bos, save_for_transformers

_SPECIALS: Mapping[str, int] = {"<pad>": 0, "<s>": 1, "</s>": 2}


class ByteTokenizer:
    """UTF-8 bytes as tokens: id = byte + 3, after the specials pad 0, bos 1, eos 2. Needs no file."""

    vocab_size = 259
    pad_id, bos_id, eos_id = 0, 1, 2
    fingerprint = hashlib.sha256(b"ftlab.ByteTokenizer: pad bos eos, then 256 bytes").hexdigest()
    specials = _SPECIALS
    token_bytes = np.asarray([0, 0, 0, *[1] * 256], dtype=np.int32)
    chat_template = None
    new_ids = range(0)

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Token ids of ``text``; BOS and EOS only where asked for."""
        ids = [byte + 3 for byte in text.encode()]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str], *, bos: bool, eos: bool) -> list[list[int]]:
        """``encode`` over many texts."""
        return [self.encode(text, bos=bos, eos=eos) for text in texts]

    def encode_after_special(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` over many texts: what comes before one makes no difference."""
        return self.encode_batch(texts, bos=False, eos=False)

    def encode_with_specials(self, text: str) -> list[int]:
        """Token ids of ``text``, in which ``<s>``, ``</s>`` and ``<pad>`` are the specials that they spell."""
        parts = re.split(f"({'|'.join(_SPECIALS)})", text)
        return [
            token
            for part in parts
            for token in ([_SPECIALS[part]] if part in _SPECIALS else self.encode(part, bos=False, eos=False))
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without specials; bytes that are no UTF-8 become U+FFFD."""
        return bytes(i - 3 for i in ids if 3 <= i < self.vocab_size).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
        vocab = {**_SPECIALS, **{char: byte + 3 for byte, char in byte_level_alphabet().items()}}
        tokenizer = HFTokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in _SPECIALS])
        begin_with_bos(tokenizer, "<s>")
        save_for_transformers(
            tokenizer, folder, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, chat_template=None
        )


def byte_level_alphabet() -> dict[int, str]:
    """The character by which Hugging Face's ByteLevel shows each byte: itself if printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
