"""Tokenised rows on disk: flat arrays, written as they come and mapped into memory by everyone who reads them.

Rows and samples are counted apart: a row that was dropped is no sample, and one that was split is several. What
became of every row is kept beside them, so that any part of the rows can be reported on without a second look.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from enum import IntFlag
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ftlab.data.cache import Lease


class Mark(IntFlag):
    """What is noteworthy about a row."""

    TOO_LONG = 1
    DROPPED = 2  # as too long
    ANSWERLESS = 4  # dropped, because cutting left nothing that is trained
    EMPTY = 8  # an answer without text
    MERGED = 16  # a token holds the end of the prompt and the start of the answer
    EOS_CUT = 32
    ALL_MASKED = 64  # nothing trained, before any cutting
    DOUBLE_BOS = 128
    DOUBLE_TEMPLATE = 256
    END_TRAINED = 512  # the token that ends an answer is trained


WEIGHTS = "weights.bin"
_ARRAYS = {
    "tokens": None,  # as wide as the vocabulary needs
    "trained": np.bool_,
    "ends": np.int64,  # per sample: where it ends in tokens
    "prompt_lens": np.int32,
    "n_trained": np.int32,  # per sample: its trained tokens
    "sample_rows": np.int64,  # per sample: its row's place among the rows
    "row_numbers": np.int64,  # per row: its number in the source
    "row_tokens": np.int32,  # per row: its length before anything was cut
    "row_marks": np.uint16,
    "row_end_ids": np.int32,  # per row: the control token that ends its last answer, -1 for none
    "row_digests": np.uint64,  # equal rows have equal digests
    "row_families": np.int32,  # into the families, -1 for none
}


class StoreWriter:
    """Appends to the arrays of a new store in ``folder``; memory does not grow with them. Use it with ``with``.

    Weights, which few sets have, are an array more, as long as ``trained``, begun with the first row that has any.
    """

    def __init__(self, folder: Path, vocab_size: int):
        self._folder = folder
        self._dtypes = {name: np.dtype(dtype) if dtype else token_dtype(vocab_size) for name, dtype in _ARRAYS.items()}
        self._files: dict[str, BinaryIO] = {name: (folder / f"{name}.bin").open("wb") for name in _ARRAYS}
        self._digest = hashlib.sha256()
        self._weights: BinaryIO | None = None
        self._range = (1.0, 1.0)  # of the weights
        self._n_tokens = self._n_rows = 0
        self._families: dict[str, int] = {}

    def add(
        self, *, families: Sequence[str | None], ends: np.ndarray, sample_rows: np.ndarray, **arrays: np.ndarray
    ) -> None:
        """Append rows and their samples; ``ends`` and ``sample_rows`` count from the first of these."""
        codes = [-1 if name is None else self._families.setdefault(name, len(self._families)) for name in families]
        arrays |= {
            "ends": ends + self._n_tokens,
            "sample_rows": sample_rows + self._n_rows,
            "row_families": np.asarray(codes),
        }
        if arrays["trained"].dtype != bool or self._weights is not None:
            self._add_weights(arrays["trained"])
        for name, array in arrays.items():
            data = np.ascontiguousarray(array, dtype=self._dtypes[name])
            self._files[name].write(data.data if data.size else b"")
            if name in ("tokens", "trained", "ends"):
                self._digest.update(data.data if data.size else b"")
        self._n_tokens += len(arrays["tokens"])
        self._n_rows += len(families)

    def _add_weights(self, trained: np.ndarray) -> None:
        if self._weights is None:
            self._weights = (self._folder / WEIGHTS).open("wb")
            self._files["trained"].flush()
            with (self._folder / "trained.bin").open("rb") as before:
                while block := before.read(1 << 20):
                    self._weights.write(np.frombuffer(block, dtype=bool).astype(np.float32).data)
        weights = trained.astype(np.float32)
        low, high = self._range
        self._range = float(weights.min(initial=low, where=weights > 0)), float(weights.max(initial=high))
        self._weights.write(weights.data if weights.size else b"")
        self._digest.update(weights.data if weights.size else b"")

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (*self._files.values(), *([self._weights] if self._weights else ())):
            file.close()

    def finish(self, **facts: Any) -> None:
        """Write what else is to be known of the rows."""
        facts |= {
            "families": list(self._families),
            "dtypes": {name: dtype.str for name, dtype in self._dtypes.items()},
            "digest": self._digest.hexdigest(),
            "weights": None if self._weights is None else self._range,
        }
        (self._folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


class Store:
    """The arrays that a ``StoreWriter`` left, mapped: all processes of a machine share one copy in memory.

    Args:
        lease: of a folder that is not to stay; it lives as long as this object.
    """

    def __init__(self, folder: Path, lease: Lease | None = None):
        self._lease = lease
        self.built_here = lease is not None and lease.built
        self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self.families: list[str] = self.facts["families"]
        self.digest: str = self.facts["digest"]

        def mapped(name: str) -> np.ndarray:
            path, dtype = folder / f"{name}.bin", np.dtype(self.facts["dtypes"][name])
            if not path.stat().st_size:
                return np.zeros(0, dtype=dtype)
            # np.asarray: slices of a memmap are memmaps too, and ten times as slow to make as plain views.
            return np.asarray(np.memmap(path, dtype=dtype, mode="r"))

        self.tokens, self.trained = mapped("tokens"), mapped("trained")
        self.weights: np.ndarray | None = None  # (total,) float32 of the tokens, where some are neither 0 nor 1
        if (folder / WEIGHTS).exists():
            self.weights = np.asarray(np.memmap(folder / WEIGHTS, dtype=np.float32, mode="r"))
        self.ends = mapped("ends")
        self.starts = np.concatenate([[0], self.ends])[:-1]
        self.n_trained = mapped("n_trained")
        self.prompt_lens, self.sample_rows = mapped("prompt_lens"), mapped("sample_rows")
        self.row_numbers, self.row_tokens = mapped("row_numbers"), mapped("row_tokens")
        self.row_marks, self.row_digests = mapped("row_marks"), mapped("row_digests")
        self.row_end_ids = mapped("row_end_ids")
        self.row_families = mapped("row_families")
