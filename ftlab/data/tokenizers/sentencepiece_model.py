"""SentencePiece models, Llama 2's own kind of tokenizer.

Exported with a ``tokenizer.json`` of our own making, because transformers 5 rebuilds one from a bare
``tokenizer.model`` and ranks its merges by id instead of by score: runs of spaces then split differently in
5 % of Alpaca's rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as HFTokenizer

from ftlab.data.cores import n_cores
from ftlab.data.tokenizers.base import TOKENIZER_JSON, begin_with_bos, save_for_transformers
from ftlab.data.tokenizers.chat import read_chat_template
from ftlab.data.tokenizers.files import KEY, MODEL_FILE, find_file, read_bytes
from ftlab.data.tokenizers.heads import LINE_FEED, encode_with_heads
from ftlab.data.tokenizers.ranks import is_rank_file
from ftlab.errors import ConfigError

TINY_MODEL = Path(__file__).parents[1] / "tiny_tokenizer.model"


class SentencePieceTokenizer:
    """A SentencePiece BPE model, as Llama 2 has it.

    Args:
        path: a ``.model`` file, a folder that holds ``tokenizer.model``, a Hub id such as
            ``meta-llama/Llama-2-7b-hf``, or ``tiny`` for the model packaged with the embedded data.

    Raises:
        ConfigError: if there is no such file, if it is not a whole SentencePiece model, or if it is of a kind
            that ``save`` could not export faithfully (better known before training than after).
    """

    new_ids = range(0)

    def __init__(self, *, path: str | None):
        file = TINY_MODEL if path == "tiny" else find_file(path, (MODEL_FILE,))
        self._proto = read_bytes(file)
        self._spec = parse_model(self._proto, file)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._proto)
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.pad_id: int = max(self._processor.pad_id(), 0)
        self.fingerprint = hashlib.sha256(self._proto).hexdigest()
        pieces = self._spec.pieces
        self.specials = {piece.piece: i for i, piece in enumerate(pieces) if piece.type == piece.CONTROL}
        self.token_bytes = np.asarray([_n_bytes(piece) for piece in pieces], dtype=np.int32)
        self.chat_template = read_chat_template(file.parent)
        self._parts_lines = parts_lines(self._spec)

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Token ids of ``text``; BOS and EOS only where asked for."""
        return self._processor.encode(text, add_bos=bos, add_eos=eos)

    def encode_batch(self, texts: Sequence[str], *, bos: bool, eos: bool) -> list[list[int]]:
        """``encode`` over many texts, on all the cores this process may use."""

        def encode(texts: Sequence[str]) -> list[list[int]]:
            return self._processor.encode(list(texts), add_bos=bos, add_eos=eos, num_threads=n_cores())

        return encode_with_heads(encode, texts) if self._parts_lines and not bos and not eos else encode(texts)

    def encode_after_special(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` over many texts: a word begins after a control piece as it does at the beginning."""
        return self.encode_batch(texts, bos=False, eos=False)

    def encode_with_specials(self, text: str) -> list[int]:
        """Token ids of ``text``, in which ``<s>`` and ``</s>`` are the control pieces that they spell."""
        return self._as_hf.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; BOS and EOS leave no trace in it."""
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.model``, and what transformers wants beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self._proto)
        save_for_transformers(self._as_hf, folder, special_names(self._spec), self.chat_template)

    def __getstate__(self) -> dict[str, Any]:
        """Without the parsed protobuf, which cannot be sent to another process; it is parsed again there."""
        return {name: value for name, value in vars(self).items() if name not in ("_spec", "_as_hf")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._spec = parse_model(self._proto, Path("tokenizer.model"))

    @cached_property
    def _as_hf(self) -> HFTokenizer:
        return as_hf(self._spec)


def parse_model(proto: bytes, file: Path) -> Any:
    """The protobuf of a SentencePiece model; the processor's own interface does not tell its kind or normaliser.

    Raises:
        ConfigError: see ``SentencePieceTokenizer``.
    """
    from sentencepiece import sentencepiece_model_pb2

    if is_rank_file(proto):
        problem = f"{file} is no SentencePiece model but a list of ranks, as Llama 3 has it (tiktoken's format)"
        raise ConfigError(KEY, problem, "tokenizer=huggingface, which reads it")
    try:
        spec = sentencepiece_model_pb2.ModelProto.FromString(proto)
        if not spec.pieces:
            raise ValueError("no pieces")
        sentencepiece.SentencePieceProcessor(model_proto=proto)
    except Exception as error:  # protobuf and SentencePiece raise their own kinds
        raise ConfigError(
            KEY,
            f"{file} ({len(proto)} bytes) is no SentencePiece model, or a truncated one",
            f"{KEY}=/path/to/a/complete/{MODEL_FILE}",
        ) from error
    _require_exportable(spec, file)
    return spec


def _require_exportable(spec: Any, file: Path) -> None:
    """Refuse what ``as_hf`` cannot express with equal ids."""
    trainer, normalizer = spec.trainer_spec, spec.normalizer_spec
    reasons = [
        (trainer.model_type != trainer.BPE, "it is not a BPE model"),
        (bool(normalizer.precompiled_charsmap), f"it normalises text ({normalizer.name})"),
        (normalizer.remove_extra_whitespaces, "it removes extra spaces"),
        (trainer.bos_id < 0 or trainer.eos_id < 0, "it has no BOS or no EOS piece"),
        (any(p.type == p.USER_DEFINED for p in spec.pieces), "it has user-defined symbols"),
    ]
    problem = next((text for holds, text in reasons if holds), None)
    if problem:
        raise ConfigError(
            KEY,
            f"{file} cannot be used: {problem}, and would not export with the same ids",
            f"tokenizer=huggingface {KEY}=/path/to/a folder with the model's {TOKENIZER_JSON}",
        )


def parts_lines(spec: Any) -> bool:
    """Whether no token holds a line feed and what stands beside it; unknown characters side by side are one token, and
    a normaliser may make a line feed and its neighbours anything."""
    normaliser = spec.normalizer_spec
    if normaliser.precompiled_charsmap or normaliser.remove_extra_whitespaces:
        return False
    of_bytes = spec.trainer_spec.byte_fallback and not spec.trainer_spec.treat_whitespace_as_suffix
    return of_bytes and not any(LINE_FEED in piece.piece and piece.piece != LINE_FEED for piece in spec.pieces)


def _n_bytes(piece: Any) -> int:
    known = {piece.BYTE: 1, piece.CONTROL: 0, piece.UNKNOWN: -1}
    return known.get(piece.type, len(piece.piece.replace("▁", " ").encode()))


def special_names(spec: Any) -> dict[str, str]:
    """The pieces of BOS, EOS, unknown and pad, under transformers' names for them."""
    trainer = spec.trainer_spec
    ids = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id, "pad": trainer.pad_id}
    return {f"{name}_token": spec.pieces[i].piece for name, i in ids.items() if i >= 0}


def as_hf(spec: Any) -> HFTokenizer:
    """The BPE model of ``spec`` for Hugging Face's ``tokenizers``, with equal ids."""
    ids = {piece.piece: i for i, piece in enumerate(spec.pieces)}
    # SentencePiece joins the neighbours whose joined piece scores highest. A list of merges says the same
    # when each way to make a piece stands at the rank of that piece's score.
    ranked = sorted(
        (-piece.score, ids[left], ids[right], left, right)
        for piece in spec.pieces
        if piece.type == piece.NORMAL
        for cut in range(1, len(piece.piece))
        if (left := piece.piece[:cut]) in ids and (right := piece.piece[cut:]) in ids
    )
    merges = [(left, right) for *_, left, right in ranked]
    trainer = spec.trainer_spec
    names = special_names(spec)
    tokenizer = HFTokenizer(
        models.BPE(
            vocab=ids, merges=merges, unk_token=names["unk_token"], fuse_unk=True, byte_fallback=trainer.byte_fallback
        )
    )
    spaces = [normalizers.Replace(" ", "▁")]
    prefix = [normalizers.Prepend("▁")] if spec.normalizer_spec.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence(prefix + spaces)
    strip = [decoders.Strip(" ", 1, 0)] if spec.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(
        [AddedToken(p.piece, normalized=False) for p in spec.pieces if p.type in (p.CONTROL, p.UNKNOWN)]
    )
    begin_with_bos(tokenizer, names["bos_token"])
    return tokenizer
