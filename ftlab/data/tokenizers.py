"""Text to token ids and back: SentencePiece models (Llama 2's own kind) and plain bytes.

``save`` writes a folder that ``transformers.AutoTokenizer`` opens with the same ids. It writes a
``tokenizer.json`` of our own making because transformers 5 rebuilds one from a bare ``tokenizer.model`` and
ranks its merges by id instead of by score: runs of spaces then split differently in 5 % of Alpaca's rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

from ftlab.errors import ConfigError

TINY_MODEL = Path(__file__).parent / "tiny_tokenizer.model"
_MODEL_FILE = "tokenizer.model"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_TIMEOUT_S = 10


class Tokenizer(Protocol):
    """What data, evaluation and export need from a tokenizer.

    Attributes:
        vocab_size: number of ids; every id is below it.
        pad_id: the id that fills short rows: the pad piece where there is one, else 0. It is never trained,
            so it must only be valid, and it need not differ from any other id.
        fingerprint: sha256 in hex of all that decides the ids.
        specials: id of every control token, by its text.
        token_bytes: (vocab_size,) UTF-8 bytes of text that each id stands for, 0 for control tokens, -1 where that
            depends; None where no id's is known. Saves ``data.spans`` from tokenising twice.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    fingerprint: str
    specials: Mapping[str, int]
    token_bytes: np.ndarray | None

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str], *, bos: bool, eos: bool) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def save(self, folder: Path) -> None: ...


class SentencePieceTokenizer:
    """A SentencePiece BPE model, as Llama 2 has it.

    Text never becomes a control piece: "</s>" in a row is encoded as characters, so that no row can end a
    sample early.

    Args:
        path: a ``.model`` file, a folder that holds ``tokenizer.model``, a Hub id such as
            ``meta-llama/Llama-2-7b-hf``, or ``tiny`` for the model packaged with the embedded data.

    Raises:
        ConfigError: if there is no such file, if it is not a whole SentencePiece model, or if it is of a kind
            that ``save`` could not export faithfully (better known before training than after).
    """

    def __init__(self, *, path: str | None):
        file = _find_model(path)
        self._proto = file.read_bytes()
        try:
            self._spec = _parse(self._proto)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._proto)
        except Exception as error:  # protobuf and SentencePiece raise their own kinds
            raise ConfigError(
                "tokenizer.path",
                f"{file} ({len(self._proto)} bytes) is no SentencePiece model, or a truncated one",
                f"tokenizer.path=/path/to/a/complete/{_MODEL_FILE}",
            ) from error
        _require_exportable(self._spec, file)
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.pad_id: int = max(self._processor.pad_id(), 0)
        self.fingerprint = hashlib.sha256(self._proto).hexdigest()
        pieces = self._spec.pieces
        self.specials = {p.piece: i for i, p in enumerate(pieces) if p.type == p.CONTROL}
        size = {pieces[0].BYTE: 1, pieces[0].CONTROL: 0, pieces[0].UNKNOWN: -1}
        sizes = [size.get(p.type, len(p.piece.replace("▁", " ").encode())) for p in pieces]
        self.token_bytes = np.asarray(sizes, dtype=np.int32)

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Token ids of ``text``; BOS and EOS only where asked for."""
        return self._processor.encode(text, add_bos=bos, add_eos=eos)

    def encode_batch(self, texts: Sequence[str], *, bos: bool, eos: bool) -> list[list[int]]:
        """``encode`` over many texts, on all the cores this process may use."""
        return self._processor.encode(list(texts), add_bos=bos, add_eos=eos, num_threads=_n_cores())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; BOS and EOS leave no trace in it."""
        return self._processor.decode([int(i) for i in ids])

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.model``, ``tokenizer.json`` and ``tokenizer_config.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MODEL_FILE).write_bytes(self._proto)
        piece = self._processor.id_to_piece
        _save_hf(
            _sentencepiece_as_hf(self._spec),
            folder,
            bos=piece(self.bos_id),
            eos=piece(self.eos_id),
            unk=piece(self._processor.unk_id()),
            pad=piece(self._processor.pad_id()) if self._processor.pad_id() >= 0 else None,
        )


class ByteTokenizer:
    """UTF-8 bytes as tokens: id = byte + 3, after the specials pad 0, bos 1, eos 2. Needs no file."""

    vocab_size = 259
    pad_id, bos_id, eos_id = 0, 1, 2
    fingerprint = hashlib.sha256(b"ftlab.ByteTokenizer: pad bos eos, then 256 bytes").hexdigest()
    specials: Mapping[str, int] = {"<pad>": 0, "<s>": 1, "</s>": 2}
    token_bytes = np.asarray([0, 0, 0, *[1] * 256], dtype=np.int32)

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Token ids of ``text``; BOS and EOS only where asked for."""
        ids = [byte + 3 for byte in text.encode()]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str], *, bos: bool, eos: bool) -> list[list[int]]:
        """``encode`` over many texts."""
        return [self.encode(text, bos=bos, eos=eos) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without specials; bytes that are no UTF-8 become U+FFFD."""
        return bytes(i - 3 for i in ids if i >= 3).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        specials = {"<pad>": self.pad_id, "<s>": self.bos_id, "</s>": self.eos_id}
        vocab = specials | {char: byte + 3 for byte, char in _byte_level_alphabet().items()}
        tokenizer = HFTokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
        _save_hf(tokenizer, folder, bos="<s>", eos="</s>", unk=None, pad="<pad>")


def _find_model(path: str | None) -> Path:
    """The ``.model`` file that ``path`` means, fetched from the Hub where it is a Hub id."""
    if path is None:
        raise ConfigError(
            "tokenizer.path",
            "is null and so is model.checkpoint, where it is looked for by default",
            f"tokenizer.path=/path/to/{_MODEL_FILE}",
        )
    if path == "tiny":
        return TINY_MODEL
    local = Path(path).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        if (local / _MODEL_FILE).is_file():
            return local / _MODEL_FILE
        raise ConfigError(
            "tokenizer.path",
            f"the folder {local.resolve()} holds no {_MODEL_FILE}",
            f"tokenizer.path=/path/to/{_MODEL_FILE}",
        )
    if _HUB_ID.fullmatch(path):
        return _fetch_from_hub(path)
    raise ConfigError(
        "tokenizer.path",
        f"{local.absolute()} does not exist; expected a SentencePiece .model file or a folder that holds {_MODEL_FILE}",
        f"tokenizer.path=/path/to/{_MODEL_FILE}",
    )


def _fetch_from_hub(repo_id: str) -> Path:
    # Not needed for local files, and half a second to import.
    from huggingface_hub import HfApi, hf_hub_download

    try:
        try:
            # A plain request first: it fails at once without a network, where a download retries for 20 s.
            HfApi().model_info(repo_id, timeout=_HUB_TIMEOUT_S)
            return Path(hf_hub_download(repo_id, _MODEL_FILE))
        except Exception as unreachable:
            try:
                return Path(hf_hub_download(repo_id, _MODEL_FILE, local_files_only=True))
            except Exception:
                raise unreachable from None
    except Exception as error:  # the Hub's client, its HTTP library and the socket each raise their own kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            "tokenizer.path",
            f"there is no local file {repo_id!r}, and {_MODEL_FILE} of the Hub's {repo_id} cannot be had: {reason}",
            f"tokenizer.path=/path/to/{_MODEL_FILE}   (a gated model also needs HF_TOKEN)",
        ) from error


def _parse(proto: bytes) -> Any:
    # The processor's own interface does not tell the kind of model or its normaliser; its protobuf does.
    from sentencepiece import sentencepiece_model_pb2

    spec = sentencepiece_model_pb2.ModelProto.FromString(proto)
    if not spec.pieces:
        raise ValueError("no pieces")
    return spec


def _require_exportable(spec: Any, file: Path) -> None:
    """Refuse what ``_sentencepiece_as_hf`` cannot express with equal ids."""
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
            "tokenizer.path",
            f"{file} cannot be used: {problem}, and would not export with the same ids",
            "tokenizer.path=/path/to/a Llama-style tokenizer.model",
        )


def _sentencepiece_as_hf(spec: Any) -> HFTokenizer:
    """The BPE model of ``spec`` for Hugging Face's ``tokenizers``."""
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
    unk = spec.pieces[trainer.unk_id].piece
    tokenizer = HFTokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=trainer.byte_fallback)
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
    return tokenizer


def _save_hf(tokenizer: HFTokenizer, folder: Path, *, bos: str, eos: str, unk: str | None, pad: str | None) -> None:
    """Write ``tokenizer.json`` with a BOS before every text, and the config that says so."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    specials = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": pad}
    config = {
        # Uses tokenizer.json as it stands. LlamaTokenizer puts a pre-tokeniser of its own in, which drops
        # the first of the spaces that a text begins with.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in specials.items() if token is not None},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _byte_level_alphabet() -> dict[int, str]:
    """The character by which Hugging Face's ByteLevel shows each byte: itself if printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


_cores: int | None = None


def use_cores(n: int) -> None:
    """Tokenise on ``n`` cores in this process, where it would take all there are."""
    global _cores
    _cores = n
    os.environ["RAYON_NUM_THREADS"] = str(n)  # the threads of Hugging Face's tokenizers


def _n_cores() -> int:
    """Cores this process may run on, which in a container or under Slurm are fewer than the machine has."""
    if _cores is not None:
        return _cores
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
