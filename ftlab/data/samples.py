"""Tokenised rows as training and evaluation use them: one by one, packed, or several sets as one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ftlab.data.batch import Pack, Sample
from ftlab.data.order import mixed, permutation
from ftlab.data.packing import Plan
from ftlab.data.store import Store
from ftlab.data.tokenizers import Tokenizer


class Samples:
    """Some of a store's samples: for training, and with prompts and answers for evaluation.

    Args:
        picks: (n,) which of the store's samples these are, in this order.
        first_id: what row 0 of the source counts as; sources of a mixture count on from each other.
    """

    def __init__(self, store: Store, picks: np.ndarray, tokenizer: Tokenizer, first_id: int = 0):
        self._store, self._picks, self._tokenizer, self._first_id = store, picks, tokenizer, first_id
        self.lengths = (store.ends - store.starts)[picks]

    def __len__(self) -> int:
        return len(self._picks)

    def tokens(self, index: int) -> np.ndarray:
        """(T,) whole numbers, prompt and answer, BOS and EOS included; a view, not a copy."""
        pick = self._picks[index]
        return self._store.tokens[self._store.starts[pick] : self._store.ends[pick]]

    def trained(self, index: int) -> np.ndarray:
        """(T,) bool or float32, see ``Sample``; a view."""
        pick, store = self._picks[index], self._store
        return (store.trained if store.weights is None else store.weights)[store.starts[pick] : store.ends[pick]]

    def sample(self, index: int) -> Sample:
        """The sample as the loader wants it."""
        return Sample(self.tokens(index), self.trained(index), self.sample_id(index))

    def sample_id(self, index: int) -> int:
        """The row's number in the source, counted from 0; the pieces of a split row have the same."""
        row = self._store.sample_rows[self._picks[index]]
        return self._first_id + int(self._store.row_numbers[row])

    def prompt_len(self, index: int) -> int:
        """Leading tokens that the last answer follows, BOS included.

        At least one, which is never trained: where no BOS begins a text, there is nothing else to go on from.
        """
        return max(1, int(self._store.prompt_lens[self._picks[index]]))

    def prompt_tokens(self, index: int) -> list[int]:
        """What to generate from."""
        return self.tokens(index)[: self.prompt_len(index)].tolist()

    def answer(self, index: int) -> str:
        """The reference answer, as far as ``too_long`` left it; nothing of what is said after it."""
        tokens, start = self.tokens(index), self.prompt_len(index)
        ends = np.flatnonzero(tokens[start:] == self._store.row_end_ids[self._store.sample_rows[self._picks[index]]])
        spoken = tokens[: start + ends[0]] if len(ends) else tokens
        # Not decode(answer tokens): a SentencePiece decoder drops the space that its first token may begin with.
        return self._tokenizer.decode(spoken.tolist())[len(self._tokenizer.decode(tokens[:start].tolist())) :]

    def family(self, index: int) -> str | None:
        """The kind of task, where the source tells."""
        code = int(self._store.row_families[self._store.sample_rows[self._picks[index]]])
        return None if code < 0 else self._store.families[code]

    def n_targets(self) -> int:
        """Trained tokens of all samples."""
        return int(self._store.n_trained[self._picks].sum(dtype=np.int64))

    def n_tokens(self) -> int:
        """Tokens of all samples."""
        return int(self.lengths.sum())

    def order(self, epoch: int, seed: int, *, shuffle: bool) -> np.ndarray:
        """(n,) the indices in the order of ``epoch``."""
        return permutation(len(self), seed, epoch) if shuffle else np.arange(len(self))

    def fingerprint(self) -> str:
        """sha256 in hex of all that training sees, its order before shuffling included."""
        digest = hashlib.sha256(self._store.digest.encode())
        digest.update(np.ascontiguousarray(self._picks, dtype=np.int64).tobytes())
        return digest.hexdigest()


class Packs:
    """Samples packed into rows of ``seq_len`` tokens."""

    def __init__(self, samples: Samples, plan: Plan, seq_len: int):
        self.samples, self._plan, self._seq_len = samples, plan, seq_len
        self.lengths = np.full(len(plan.ends), seq_len)

    def __len__(self) -> int:
        return len(self._plan.ends)

    def documents(self, index: int) -> np.ndarray:
        """(k,) which of the samples are in this pack."""
        start = self._plan.ends[index - 1] if index else 0
        return self._plan.documents[start : self._plan.ends[index]]

    def sample(self, index: int) -> Pack:
        """The pack as the loader wants it."""
        return Pack([self.samples.sample(int(i)) for i in self.documents(index)], self._seq_len)

    def efficiency(self) -> float:
        """Share of the rows' tokens that are no padding."""
        return self.samples.n_tokens() / (len(self) * self._seq_len)

    def n_targets(self) -> int:
        """Trained tokens of all samples."""
        return self.samples.n_targets()

    def order(self, epoch: int, seed: int, *, shuffle: bool) -> np.ndarray:
        """(n,) the packs in the order of ``epoch``."""
        return permutation(len(self), seed, epoch) if shuffle else np.arange(len(self))

    def fingerprint(self) -> str:
        """sha256 in hex of all that training sees."""
        parts = (self.samples.fingerprint().encode(), self._plan.documents.tobytes(), self._plan.ends.tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()


class Rows(Protocol):
    """What can be dealt out to training: samples or packs."""

    lengths: np.ndarray

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample | Pack: ...

    def n_targets(self) -> int: ...

    def order(self, epoch: int, seed: int, *, shuffle: bool) -> np.ndarray: ...

    def fingerprint(self) -> str: ...


class MixedRows:
    """Several sets as one, in given shares: an epoch takes ``counts[k]`` rows of set ``k``, going on where it was.

    Indices count through all sets; an epoch's length is not their sum but that of ``counts``.
    """

    def __init__(self, sets: Sequence[Rows], counts: Sequence[int]):
        self.sets, self.counts = sets, list(counts)
        self._first = np.concatenate([[0], np.cumsum([len(rows) for rows in sets])])
        self.lengths = np.concatenate([rows.lengths for rows in sets])

    def __len__(self) -> int:
        return sum(self.counts)

    def sample(self, index: int) -> Sample | Pack:
        """The row as the loader wants it."""
        k = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.sets[k].sample(index - int(self._first[k]))

    def n_targets(self) -> int:
        """Trained tokens of an epoch, on average."""
        shares = (rows.n_targets() * n / len(rows) for rows, n in zip(self.sets, self.counts, strict=True))
        return round(sum(shares))

    def order(self, epoch: int, seed: int, *, shuffle: bool) -> np.ndarray:
        """(n,) the rows of ``epoch``, some more than once where a set is small."""
        return mixed([len(rows) for rows in self.sets], self.counts, seed, epoch, shuffle=shuffle)

    def fingerprint(self) -> str:
        """sha256 in hex of all that training sees."""
        parts = [*(rows.fingerprint() for rows in self.sets), *map(str, self.counts)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


class JoinedSamples:
    """The validation samples of several sets, one set after another."""

    def __init__(self, sets: Sequence[Samples]):
        self._sets = sets
        self._first = np.concatenate([[0], np.cumsum([len(samples) for samples in sets])])
        self.lengths = np.concatenate([samples.lengths for samples in sets])

    def __len__(self) -> int:
        return int(self._first[-1])

    def _at(self, index: int) -> tuple[Samples, int]:
        k = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._sets[k], index - int(self._first[k])

    def sample(self, index: int) -> Sample:
        """See ``Samples``, as all that follows."""
        samples, i = self._at(index)
        return samples.sample(i)

    def sample_id(self, index: int) -> int:
        samples, i = self._at(index)
        return samples.sample_id(i)

    def prompt_tokens(self, index: int) -> list[int]:
        samples, i = self._at(index)
        return samples.prompt_tokens(i)

    def answer(self, index: int) -> str:
        samples, i = self._at(index)
        return samples.answer(i)

    def family(self, index: int) -> str | None:
        samples, i = self._at(index)
        return samples.family(i)

    def order(self, epoch: int, seed: int, *, shuffle: bool) -> np.ndarray:
        return permutation(len(self), seed, epoch) if shuffle else np.arange(len(self))

    def fingerprint(self) -> str:
        return hashlib.sha256(" ".join(samples.fingerprint() for samples in self._sets).encode()).hexdigest()
