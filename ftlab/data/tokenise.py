"""Rows to samples: fields, conversation, tokens and mask, cut to length; in this process or in several."""

from __future__ import annotations

import gc
import hashlib
import json
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from typing import Any

import numpy as np

from ftlab.data.cores import use_cores
from ftlab.data.encode import Encoded, Encoder, Rendered
from ftlab.data.fields import located, mapped_columns, row_fields
from ftlab.data.formats import Conversation, Format
from ftlab.data.problems import BadRow, Problem
from ftlab.data.shorten import Piece, TooLong, shorten
from ftlab.data.sources import Chunk
from ftlab.data.store import Mark, StoreWriter
from ftlab.data.templates import Template
from ftlab.data.tokenizers import Tokenizer

# A rendered conversation's signs, which are no accident in a row.
_MARKERS = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>", "<|begin_of_text|>", "<|endoftext|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>", "### Instruction:\n", "### Response:"),
    *("<|user|>", "<|assistant|>"),
)
# At the start of a row. HTML has the first of them too, but not in many rows of a set.
_BOS_TEXTS = ("<s>", "<|begin_of_text|>", "<bos>")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides what a row's tokens are; goes to worker processes as it is."""

    format: Format
    column_map: Mapping[str, str | None]
    template: Template
    tokenizer: Tokenizer
    train_on_input: bool
    seq_len: int
    too_long: TooLong


@dataclass
class Made:
    """The samples of a chunk of rows, as ``StoreWriter.add`` takes them, and the rows that could not be used."""

    arrays: dict[str, Any]
    problems: list[Problem]
    n_rows: int


class Tokeniser:
    """Makes samples of rows, a chunk at a time."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self.columns = mapped_columns(recipe.format, recipe.column_map)
        self._encoder = Encoder(
            tokenizer=recipe.tokenizer, template=recipe.template, train_on_input=recipe.train_on_input
        )

    def __call__(self, chunk: Chunk) -> Made:
        """The samples of ``chunk``; a row that cannot be used is a problem, with its place."""
        with _no_collector():
            return self._make(chunk)

    def _make(self, chunk: Chunk) -> Made:
        problems: list[Problem] = []
        numbers, rendered = array("q"), []
        regroup = getattr(self._recipe.format, "regroup", None)
        rows = row_fields(chunk, self._recipe.format, self.columns, problems.append)
        for number, fields in rows if regroup is None else regroup(rows):
            try:
                rendered.append(self._encoder.render(self._recipe.format.conversation(fields)))
                numbers.append(number)
            except BadRow as bad:
                problems.append(located(bad, number, chunk.where))
        encoded = self._encoder(rendered)
        samples = _Samples(self._recipe, encoded, self._marks(rendered, encoded))
        digests = np.asarray([_digest(row.conversation) for row in rendered], dtype=np.uint64)
        return Made(
            {
                **samples.arrays(),
                "row_numbers": np.asarray(numbers),
                "row_tokens": np.diff(encoded.offsets),
                "row_marks": samples.marks,
                "row_end_ids": encoded.end_ids,
                "row_digests": digests,
                "families": [row.conversation.family for row in rendered],
            },
            problems,
            len(chunk.rows),
        )

    def _marks(self, rendered: Sequence[Rendered], encoded: Encoded) -> np.ndarray:
        """(n,) what is noteworthy about the rows before anything is cut."""
        marks = np.zeros(len(encoded), dtype=np.int64)
        marks[encoded.merged] |= Mark.MERGED
        lengths = np.diff(encoded.offsets)
        trained = encoded.trained.astype(bool, copy=False)
        marks[_per_row(trained, encoded.offsets) == 0] |= Mark.ALL_MASKED
        ends = trained & (encoded.tokens == np.repeat(encoded.end_ids, lengths))
        marks[_per_row(ends, encoded.offsets) > 0] |= Mark.END_TRAINED
        bos, starts = self._recipe.tokenizer.bos_id, encoded.offsets[:-1]
        longer = lengths > 1
        twice = (encoded.tokens[starts[longer]] == bos) & (encoded.tokens[starts[longer] + 1] == bos)
        marks[np.flatnonzero(longer)[twice]] |= Mark.DOUBLE_BOS
        for i, (conversation, parts) in enumerate(rendered):
            for n, message in enumerate(conversation.messages):
                text = message.text
                # Without words it may still say something: calls of tools, as a Jinja template renders them.
                if (
                    message.trained
                    and _is_blank(text)
                    and all(_is_blank(part.text) for part in parts if part.message == n)
                ):
                    marks[i] |= Mark.EMPTY
                if ("<" in text or "[" in text or "###" in text) and any(marker in text for marker in _MARKERS):
                    marks[i] |= Mark.DOUBLE_TEMPLATE
            if conversation.messages[0].text.startswith(_BOS_TEXTS):
                marks[i] |= Mark.DOUBLE_TEMPLATE
        return marks


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


@contextmanager
def _no_collector() -> Iterator[None]:
    """A chunk is many small objects without cycles: looking through them for some costs a tenth of all time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Samples:
    """Encoded rows cut to length; ``marks`` also tell what became of them."""

    def __init__(self, recipe: Recipe, encoded: Encoded, marks: np.ndarray):
        self._recipe, self._encoded, self.marks = recipe, encoded, marks
        too_long = np.diff(encoded.offsets) > recipe.seq_len
        self.marks[too_long] |= Mark.TOO_LONG
        self._as_they_are = not too_long.any() and not (marks & Mark.ALL_MASKED).any()

    def arrays(self) -> dict[str, np.ndarray]:
        """Tokens, masks and places of the samples."""
        encoded = self._encoded
        if self._as_they_are:
            every = np.arange(len(encoded))
            return _arrays(encoded.tokens, encoded.trained, encoded.offsets[1:], encoded.prompt_lens, every)
        pieces: list[Piece] = []
        rows = array("q")
        for row in range(len(encoded)):
            made = self._pieces(row)
            pieces += made
            rows.extend([row] * len(made))
        ends = np.cumsum([len(piece.tokens) for piece in pieces], dtype=np.int64)
        return _arrays(
            np.concatenate([piece.tokens for piece in pieces] or [encoded.tokens[:0]]),
            np.concatenate([piece.trained for piece in pieces] or [encoded.trained[:0]]),
            ends,
            np.asarray([piece.prompt_len for piece in pieces], dtype=np.int64),
            np.asarray(rows, dtype=np.int64),
        )

    def _pieces(self, row: int) -> list[Piece]:
        encoded, recipe = self._encoded, self._recipe
        start, end = encoded.offsets[row : row + 2]
        whole = Piece(encoded.tokens[start:end], encoded.trained[start:end], int(encoded.prompt_lens[row]))
        if self.marks[row] & Mark.ALL_MASKED:
            return []
        if not self.marks[row] & Mark.TOO_LONG:
            return [whole]
        pieces = shorten(
            whole,
            recipe.seq_len,
            recipe.too_long,
            end_id=int(encoded.end_ids[row]),
            bos_id=recipe.tokenizer.bos_id,
        )
        if recipe.too_long in ("drop", "error"):
            self.marks[row] |= Mark.DROPPED
        elif not pieces:
            self.marks[row] |= Mark.ANSWERLESS
        elif recipe.too_long in ("truncate", "truncate_keep_eos") and pieces[0].tokens[-1] != encoded.end_ids[row]:
            self.marks[row] |= Mark.EOS_CUT
        return pieces


def _arrays(
    tokens: np.ndarray, trained: np.ndarray, ends: np.ndarray, prompt_lens: np.ndarray, rows: np.ndarray
) -> dict[str, np.ndarray]:
    n_trained = _per_row(trained.astype(bool, copy=False), np.concatenate([[0], ends]))
    return {
        **{"tokens": tokens, "trained": trained, "ends": ends},
        **{"prompt_lens": prompt_lens, "n_trained": n_trained, "sample_rows": rows},
    }


def _per_row(mask: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(n,) how many tokens of each row are in ``mask``."""
    before = np.concatenate([[0], np.cumsum(mask)])
    return before[offsets[1:]] - before[offsets[:-1]]


def _digest(conversation: Conversation) -> int:
    # With the lengths, so that no two conversations run into the same text.
    said = "".join(
        [
            f"{message.role} {len(message.content)} {len(message.context)} {message.content}{message.context}"
            for message in conversation.messages
        ]
    )
    # Tools are content as words are. What else a set says of a message is not: an id or a date makes no other row.
    calls = [message.tool_calls for message in conversation.messages]
    if conversation.tools or any(calls):
        said += json.dumps([conversation.tools, calls], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")


# ---- in several processes --------------------------------------------------------------------------------


def tokenise(
    chunks: Iterable[Chunk],
    recipe: Recipe,
    writer: StoreWriter,
    on_problem: Callable[[Problem], None],
    n_workers: int,
) -> Iterator[Chunk]:
    """Write the samples of all chunks, in order; yields each chunk when it is done.

    Args:
        n_workers: processes that tokenise; 0: this one does it.
    """
    for chunk, made in _in_processes(chunks, recipe, n_workers) if n_workers else _here(chunks, recipe):
        for problem in made.problems:
            on_problem(problem)
        writer.add(**made.arrays)
        yield chunk


def _here(chunks: Iterable[Chunk], recipe: Recipe) -> Iterator[tuple[Chunk, Made]]:
    make = Tokeniser(recipe)
    for chunk in chunks:
        yield chunk, make(chunk)


def _in_processes(chunks: Iterable[Chunk], recipe: Recipe, n_workers: int) -> Iterator[tuple[Chunk, Made]]:
    Tokeniser(recipe)  # what is wrong with the recipe is raised here, where it can be told
    # spawn, not fork: threads of this process (BLAS, W&B, heartbeats) do not survive a fork.
    pool = ProcessPoolExecutor(n_workers, get_context("spawn"), initializer=_start_worker, initargs=(recipe,))
    waiting: deque[tuple[Chunk, Future[Made]]] = deque()
    with pool:
        try:
            for chunk in chain(chunks, [None] * 2 * n_workers):
                if chunk is not None:
                    waiting.append((chunk, pool.submit(_make, chunk)))
                # As many chunks under way as keep the workers busy, no more: memory stays what it is.
                if waiting and (chunk is None or len(waiting) >= 2 * n_workers):
                    done, future = waiting.popleft()
                    yield done, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: Tokeniser | None = None


def _start_worker(recipe: Recipe) -> None:
    global _worker
    use_cores(1)  # the processes are what runs beside each other here
    _worker = Tokeniser(recipe)


def _make(chunk: Chunk) -> Made:
    assert _worker is not None
    return _worker(chunk)
