"""Llama 3's ``tokenizer.model``, a list of byte sequences and their ranks (tiktoken's format)."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from ftlab.data.tokenizers.base import begin_with_bos
from ftlab.data.tokenizers.byte import byte_level_alphabet
from ftlab.data.tokenizers.files import KEY, MODEL_FILE
from ftlab.errors import ConfigError

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+")

# How Llama 3 splits text before merging (github.com/meta-llama/llama3, llama/tokenizer.py).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The 256 ids after the ranks, under the names of Llama 3.1 and later. Llama 3 had fewer names and the same ids.
_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_RESERVED = (f"<|reserved_special_token_{i}|>" for i in range(256 - len(_NAMED)))
SPECIALS = [_NAMED[i] if i in _NAMED else next(_RESERVED) for i in range(256)]
SPECIAL_NAMES = {"bos_token": _NAMED[0], "eos_token": _NAMED[1], "pad_token": _NAMED[4]}


def is_rank_file(content: bytes) -> bool:
    """Whether this is tiktoken's format, told by its first line; a SentencePiece model begins with other bytes."""
    return _LINE.fullmatch(content[:1024].split(b"\n", 1)[0].rstrip(b"\r")) is not None


def read_ranks(content: bytes, file: Path) -> dict[bytes, int]:
    """Every byte sequence that is a token, with its rank, which is its id.

    Raises:
        ConfigError: for a file that is cut short or has been changed.
    """
    ranks: dict[bytes, int] = {}
    number = 0
    try:
        for number, line in enumerate(content.splitlines(), start=1):  # noqa: B007 -- for the message
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        _refuse(file, content, f"line {number} is not a token and its rank", error)
    if sorted(ranks.values()) != list(range(len(ranks))):
        _refuse(file, content, f"its {len(ranks)} ranks are not 0 to {len(ranks) - 1}")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        _refuse(file, content, "not every byte is a token in it")
    return ranks


def _refuse(file: Path, content: bytes, reason: str, error: Exception | None = None) -> None:
    raise ConfigError(
        KEY,
        f"{file} ({len(content)} bytes) is no complete list of ranks as Llama 3 has it: {reason}",
        f"{KEY}=/path/to/a/complete/{MODEL_FILE}",
    ) from error


def ranks_as_hf(ranks: dict[bytes, int]) -> HFTokenizer:
    """The same tokenizer for ``tokenizers``, with equal ids and Llama 3's specials after the ranks."""
    alphabet = byte_level_alphabet()
    shown = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    # tiktoken joins the neighbours whose joined bytes have the lowest rank, however these are cut in two. A list of
    # merges says the same when every way to cut a token stands at its rank.
    merges = [
        (shown[left], shown[right])
        for token in sorted(ranks, key=ranks.__getitem__)
        for left, right in _ways_to_cut(token, ranks)
    ]
    # ignore_merges: what is a token as a whole is that token, though merging might not lead to it; as in tiktoken.
    vocab = {shown[token]: rank for token, rank in ranks.items()}
    tokenizer = HFTokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIALS])
    begin_with_bos(tokenizer, SPECIAL_NAMES["bos_token"])
    return tokenizer


def _ways_to_cut(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that ``token`` may be joined from."""
    cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
    known = [(left, right) for left, right in cuts if left in ranks and right in ranks]
    return sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
