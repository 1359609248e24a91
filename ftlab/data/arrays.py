"""A source's rows as arrays: found in the cache by everything that decides them, or made now."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ftlab.data.cache import Lease, cached, key_of
from ftlab.data.cores import n_cores
from ftlab.data.fields import Absent, located, mapped_columns
from ftlab.data.files import NumberedRow
from ftlab.data.filters import Filter
from ftlab.data.problems import BadRow, Problem, Refusal
from ftlab.data.sources import Chunk, Source
from ftlab.data.store import Store, StoreWriter
from ftlab.data.tokenise import Recipe, tokenise

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]

WINDOWS = "windows"  # of the cache: what does not stay

# Above this much to tokenise, starting processes costs less than they save.
_WORTH_PROCESSES = {"KiB": 1 << 15, "rows": 50_000}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which of a source's rows are used.

    Attributes:
        expression: see ``filters``; null keeps all.
        limit: the first so many; null: all.
        allow: kinds of problems that cost a row and not the run.
        inspecting: all kinds do.
    """

    expression: str | None
    limit: int | None
    allow: tuple[str, ...]
    inspecting: bool


def tokenised(
    source: Source,
    recipe: Recipe,
    choice: Choice,
    cache_dir: Path,
    progress: Progress | None,
    label: str,
    *,
    stays: bool = True,
) -> Store:
    """The arrays of the rows of ``source`` that ``choice`` leaves, made by ``recipe``.

    Args:
        stays: on the disk, when nobody reads them any more.
    """
    made_of = {
        "code": code_of(recipe.format, recipe.template, recipe.tokenizer),
        "rows": source.fingerprint(),
        "choice": vars(choice),
        "columns": mapped_columns(recipe.format, recipe.column_map),
        "options": [recipe.seq_len, recipe.too_long, recipe.train_on_input],
        "tokenizer": [recipe.tokenizer.fingerprint, recipe.tokenizer.chat_template],
        "format": _state_of(recipe.format),
        "template": _state_of(recipe.template),
    }

    def write(folder: Path) -> None:
        size, unit = source.size()
        bar = progress(f"{label}, {unit}", size) if progress else nullcontext(lambda _: None)
        n_workers = n_cores() if size >= _WORTH_PROCESSES[unit] and n_cores() > 1 else 0
        refusal = Refusal(choice.allow, goes_on=choice.inspecting)
        reader = _Reader(choice, recipe)
        with StoreWriter(folder, recipe.tokenizer.vocab_size) as writer, bar as advance:
            told = 0
            for chunk in tokenise(reader.chunks(source, refusal), recipe, writer, refusal, n_workers):
                advance(chunk.done - told)
                told = chunk.done
            advance(size - told)
            writer.finish(
                rows_read=reader.n_read,
                filtered_rows=reader.n_filtered,
                problems=[vars(problem) for problem in refusal.problems],
                absent=vars(reader.absent),
            )

    key = key_of(made_of)
    if stays:
        return Store(cached(cache_dir, "rows", key, write))
    lease = Lease(cache_dir, WINDOWS, key, write)
    return Store(lease.folder, lease)


class _Reader:
    """Reads what is needed of a source, and counts what it leaves out."""

    def __init__(self, choice: Choice, recipe: Recipe):
        self._filter = Filter(choice.expression) if choice.expression is not None else None
        self._limit = choice.limit
        mapped = mapped_columns(recipe.format, recipe.column_map)
        self._columns = sorted({*mapped.values(), *(self._filter.names if self._filter else ())})
        self.absent = Absent(recipe.format, mapped)
        self._whole = hasattr(recipe.format, "regroup")
        self.n_read = self.n_filtered = 0

    def chunks(self, source: Source, refusal: Refusal) -> Iterator[Chunk]:
        """The rows that are kept, of those with numbers below ``limit``."""
        found = self._kept(source, refusal)
        # A format that puts rows together needs to see them all: a group may go over the end of a chunk.
        yield from [_joined(list(found))] if self._whole else found

    def _kept(self, source: Source, refusal: Refusal) -> Iterator[Chunk]:
        limit = float("inf") if self._limit is None else self._limit

        def refuse(problem: Problem) -> None:
            # A chunk's faults are met before its rows, those behind the limit too: only numbers tell what is wanted.
            if problem.row is None or problem.row < limit:
                self.n_read += 1
                refusal(problem)

        for chunk in source.chunks(self._columns, refuse):
            is_last = chunk.rows[-1][0] + 1 >= limit
            rows = [row for row in chunk.rows if row[0] < limit] if is_last else chunk.rows
            self.n_read += len(rows)
            self.absent.look_at(rows)
            if self._filter is not None:
                rows = list(self._filtered(self._filter, chunk._replace(rows=rows), refusal))
            if rows:
                yield chunk._replace(rows=rows)
            if is_last:
                return

    def _filtered(self, filter: Filter, chunk: Chunk, refusal: Refusal) -> Iterator[NumberedRow]:
        """The rows of ``chunk`` that are kept; one that the expression does not apply to is a problem."""
        for number, row in chunk.rows:
            try:
                if filter.keeps(row):
                    yield number, row
                else:
                    self.n_filtered += 1
            except BadRow as bad:
                refusal(located(bad, number, chunk.where))


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    if not chunks:
        return Chunk("", [], 0)
    return Chunk(chunks[0].where, [row for chunk in chunks for row in chunk.rows], chunks[-1].done)


def _state_of(thing: Any) -> list[Any]:
    """Class and attributes of a format or template, as far as they decide what it does."""
    state = thing.fingerprint if hasattr(thing, "fingerprint") else sorted((k, repr(v)) for k, v in vars(thing).items())
    return [type(thing).__module__, type(thing).__qualname__, state]


def code_of(*things: Any) -> str:
    """A digest of the code that makes samples: that of this package, and that of classes from elsewhere."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    for thing in things:
        module = sys.modules[type(thing).__module__]
        if (source := inspect.getsourcefile(module)) is not None:
            files.append(Path(source))
    return _digest_of(tuple(files))


@cache
def _digest_of(files: tuple[Path, ...]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
