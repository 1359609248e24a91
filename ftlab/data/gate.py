"""What is wrong with the data, found before it costs a run; some of it stops the run unless it is allowed by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ftlab.data.problems import BLOCKING, KINDS, Problem
from ftlab.data.report import Part, report_on
from ftlab.data.store import Mark, Store
from ftlab.data.tokenizers import Tokenizer
from ftlab.errors import ConfigError, DataError

__all__ = [
    "Finding",
    "Part",
    "allowing",
    "find",
    "on_both_sides",
    "refuse_absent",
    "refuse_empty",
    "refuse_too_long",
    "repeated",
    "stop_or_tell",
    "stopping",
]

_SHOWN_ROWS = 10
_TOLD_OTHERWISE = ("pad_is_eos", "too_long", "eos_cut")  # a note, and what Dataset says with the policy's name

_MARKED = {
    "all_masked": Mark.ALL_MASKED,
    "double_bos": Mark.DOUBLE_BOS,
    "double_template": Mark.DOUBLE_TEMPLATE,
    "too_long": Mark.TOO_LONG,
    "eos_cut": Mark.EOS_CUT,
    "prompt_not_a_prefix": Mark.MERGED,
    "empty_output": Mark.EMPTY,
}


@dataclass(frozen=True)
class Finding:
    """One kind of problem in one part of the rows.

    Attributes:
        part: ``train`` or ``validation``; empty for rows that never got so far.
        rows: their numbers in the source, as far as they have one.
        n: how many there are, of ``of``.
        stops: whether a run may not begin with this, unless its kind is allowed.
        example: a message about one of them, where there is one.
    """

    kind: str
    part: str
    rows: list[int]
    n: int
    of: int
    stops: bool
    example: str = ""

    def __str__(self) -> str:
        if not self.n:
            return KINDS[self.kind][1]
        what = f"{self.n} of {self.of} {self.part} rows".replace("  ", " ") if self.of else f"{self.n} rows"
        shown = ", ".join(map(str, self.rows[:_SHOWN_ROWS])) + (", …" if len(self.rows) > _SHOWN_ROWS else "")
        where = f" (row{'s' * (len(self.rows) > 1)} {shown})" if self.rows else ""
        return f"{what}: {KINDS[self.kind][1]}{where}"


def find(parts: Sequence[Part], problems: Sequence[Problem], tokenizer: Tokenizer) -> list[Finding]:
    """All that is wrong with the rows.

    Args:
        problems: of rows that could not be read; those that are left were allowed, or are to be collected.
    """
    found = list(_unreadable(problems))
    for part in parts:
        found += _marked(part)
        found += _repeated(part)
        other_end = part.rows & (part.store.row_end_ids >= 0) & (part.store.row_end_ids != tokenizer.eos_id)
        found += _finding("end_is_not_eos", part, part.store.row_numbers[other_end].tolist())
    if len(parts) == 2:
        found += on_both_sides(*parts)
    if tokenizer.pad_id == tokenizer.eos_id:
        found.append(Finding("pad_is_eos", "", [], 0, 0, False))
    return found


def stopping(findings: Sequence[Finding], allow: Sequence[str]) -> list[Finding]:
    """Those that a run may not begin with."""
    return [finding for finding in findings if finding.stops and finding.kind not in allow]


def allowing(findings: Sequence[Finding], allow: Sequence[str]) -> str:
    """What ``allow`` has to be for a run to begin with ``findings``, as an override needs it."""
    return f"[{','.join(dict.fromkeys([*allow, *(finding.kind for finding in findings)]))}]"  # those of before stay


def stop_or_tell(findings: Sequence[Finding], allow: Sequence[str]) -> list[str]:
    """The findings as warnings.

    Raises:
        DataError: for those that stop a run and are not allowed.
    """
    if found := stopping(findings, allow):
        kinds = list(dict.fromkeys(finding.kind for finding in found))
        first = found[0].example or f"dataset: {found[0]}"
        more = f" (and {', '.join(kinds[1:])})" if kinds[1:] else ""
        raise DataError(f"{first}{more}\n  try: python -m ftlab check-data, or dataset.allow={allowing(found, allow)}")
    return [str(finding) for finding in findings if finding.kind not in _TOLD_OTHERWISE]


def refuse_absent(store: Store) -> None:
    """Raise ConfigError if a field is mapped to a column that no row has."""
    absent, found = store.facts["absent"]["columns"], store.facts["absent"]["found"]
    if absent and found is not None:
        name, column = next(iter(absent.items()))
        rows = f"none of the {store.facts['rows_read']} rows read has a column {column!r}"
        problem = f"{rows}; those of the first are {', '.join(found)}"
        raise ConfigError(f"dataset.column_map.{name}", problem, f"dataset.column_map.{name}=null")


def refuse_too_long(part: Part, seq_len: int) -> None:
    """Raise DataError if a row has more than ``seq_len`` tokens, as ``too_long=error`` wants."""
    lengths = part.store.row_tokens[part.rows]
    if n := part.count(Mark.TOO_LONG):
        longest = int(lengths.max())
        row = int(part.store.row_numbers[part.rows][np.argmax(lengths)])
        raise DataError(
            f"dataset.too_long: {n} of {len(lengths)} {part.name} rows have more than seq_len={seq_len} "
            f"tokens, the longest {longest} (row {row}), and too_long=error\n"
            f"  try: seq_len={longest}, or dataset.too_long=truncate"
        )


def refuse_empty(part: Part, seq_len: int) -> None:
    """Raise DataError if none of the rows became a sample."""
    report = report_on(part)
    if not report["samples"]:
        raise DataError(
            f"dataset: none of {report['rows']} {part.name} rows is left: {report['dropped_too_long_rows']} dropped "
            f"as longer than seq_len={seq_len}, {report['dropped_without_answer_rows']} dropped because truncation "
            f"left nothing of their answer, {report['all_masked_rows']} without a trained token\n"
            f"  try: seq_len={report['max_row_tokens']}"
        )


def _finding(kind: str, part: Part, rows: list[int]) -> Iterator[Finding]:
    if rows:
        limit, of = KINDS[kind][0], int(part.rows.sum())
        yield Finding(kind, part.name, rows, len(rows), of, limit is not None and len(rows) > limit * of)


def _marked(part: Part) -> Iterator[Finding]:
    for kind, mark in _MARKED.items():
        yield from _finding(kind, part, part.numbers(mark))
    endless = part.store.row_marks & (Mark.END_TRAINED | Mark.ALL_MASKED | Mark.DROPPED | Mark.ANSWERLESS) == 0
    yield from _finding("eos_never_trained", part, part.store.row_numbers[part.rows & endless].tolist())


def _repeated(part: Part) -> Iterator[Finding]:
    again = repeated(part.store.row_digests[part.rows])
    yield from _finding("duplicate", part, part.store.row_numbers[part.rows][again].tolist())


def repeated(digests: np.ndarray) -> np.ndarray:
    """Which of the rows are the same as an earlier one, in ascending order."""
    order = np.argsort(digests, kind="stable")  # equal rows side by side, the earliest first
    ordered = digests[order]
    return np.sort(order[1:][ordered[1:] == ordered[:-1]])


def on_both_sides(train: Part, validation: Part) -> Iterator[Finding]:
    """The rows of ``validation`` that are in ``train`` too, be it of another set."""
    known = train.store.row_digests[train.rows]
    both = np.isin(validation.store.row_digests[validation.rows], known)
    yield from _finding(
        "in_train_and_validation", validation, validation.store.row_numbers[validation.rows][both].tolist()
    )


def _unreadable(problems: Sequence[Problem]) -> Iterator[Finding]:
    for kind in dict.fromkeys(problem.kind for problem in problems):
        of_kind = [problem for problem in problems if problem.kind == kind]
        rows = [problem.row for problem in of_kind if problem.row is not None]
        yield Finding(kind, "", rows, len(of_kind), 0, kind in BLOCKING, of_kind[0].message)
