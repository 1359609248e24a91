"""What data, evaluation and export need from a tokenizer, and how one is written for Hugging Face's tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import processors

TOKENIZER_JSON, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


class Tokenizer(Protocol):
    """Text to ids and back.

    Text never becomes a special token (BOS, EOS, the marks of a chat): "</s>" in a row is encoded as characters,
    so that no row can end a sample early. ``encode_with_specials`` is for text of our own, a template's, that
    means what it spells.

    Attributes:
        vocab_size: number of ids; every id is below it.
        bos_id: None where the tokenizer has no BOS (Qwen); asking for one then adds nothing.
        pad_id: the id that fills short rows: the pad token where there is one, else 0. Padding is told by its
            position and never by its id: it is not trained and no real token attends to it. So it must only be
            a valid id, and may well be that of EOS (Llama 3, GPT-2), which is learned all the same.
        fingerprint: sha256 in hex of all that decides the ids.
        specials: id of every special token, by its text.
        token_bytes: (vocab_size,) int32, UTF-8 bytes of text that each id stands for: 0 for specials, -1 where that
            depends; None where nothing is known of any.
        chat_template: the Jinja source that came with the tokenizer, if any did.
        new_ids: those that the configuration added to what the tokenizer's files hold.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    fingerprint: str
    specials: Mapping[str, int]
    token_bytes: np.ndarray | None
    chat_template: str | None
    new_ids: range

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str], *, bos: bool, eos: bool) -> list[list[int]]: ...

    def encode_after_special(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode_batch`` for texts that follow a special: some tokenizers treat a row's first word differently."""
        ...

    def encode_with_specials(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; those from ``vocab_size`` on, which a model with rows to spare may make, have none."""

    def save(self, folder: Path) -> None: ...


def begin_with_bos(tokenizer: HFTokenizer, bos: str) -> None:
    """Let transformers put ``bos`` before every text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def save_for_transformers(
    tokenizer: HFTokenizer, folder: Path, config: Mapping[str, Any], chat_template: str | None
) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and, if there is one, ``chat_template.jinja``.

    Args:
        config: further keys of tokenizer_config.json, first of all the specials: ``bos_token``, ``eos_token``…
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / TOKENIZER_JSON))
    content = {
        **config,
        # Uses tokenizer.json as it stands. A class named after a model (LlamaTokenizer) has transformers 5 build
        # parts of its own instead, which for Llama drop the first of the spaces that a text begins with.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / CHAT_TEMPLATE).unlink(missing_ok=True)
    if chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
