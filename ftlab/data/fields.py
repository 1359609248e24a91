"""The fields of a row: which column each comes from, and whether it holds what the format needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ftlab.data.files import NumberedRow
from ftlab.data.formats import Format
from ftlab.data.problems import BadRow, Problem, require_characters, require_object
from ftlab.data.sources import Chunk
from ftlab.errors import ConfigError


def mapped_columns(format: Format, column_map: Mapping[str, str | None]) -> dict[str, str]:
    """Field to column, for the fields that the set has.

    Raises:
        ConfigError: for a field that the format does not know, or one that it needs and that is mapped to nothing.
    """
    kinds = format.fields
    if unknown := sorted(name for name, column in column_map.items() if name not in kinds and column is not None):
        problem = f"is no field of {type(format).__name__}; its fields are {', '.join(kinds)}"
        raise ConfigError(f"dataset.column_map.{unknown[0]}", problem)
    for name, kind in kinds.items():
        if column_map.get(name) is None and not kind.endswith("?"):
            raise ConfigError(
                f"dataset.column_map.{name}",
                "is null, and every row needs this field",
                f"dataset.column_map.{name}=COLUMN",
            )
    return {name: column for name in kinds if (column := column_map.get(name)) is not None}


def row_fields(
    chunk: Chunk, format: Format, columns: Mapping[str, str], on_problem: Callable[[Problem], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and fields of every row that has those it needs, each of its kind; an optional one it lacks is null."""
    wanted = [(field, format.fields[field], column) for field, column in columns.items()]
    for number, row in chunk.rows:
        fields = {}
        try:
            for field, kind, column in wanted:
                value = row.get(column) if type(row) is dict else None
                # Most values need no closer look: this is a row's way, a million times.
                plain = type(value) is str and kind != "list" and value.isascii()
                fields[field] = value if plain else _value(row, field, kind, column)
        except BadRow as bad:
            on_problem(located(bad, number, chunk.where))
        else:
            yield number, fields


def _value(row: Any, name: str, kind: str, column: str) -> Any:
    """The value of one field of a row, checked."""
    require_object(row)
    wanted, optional = kind.removesuffix("?"), kind.endswith("?")
    if column not in row and not optional:
        found = ", ".join(map(str, row))
        problem = f"has no field {column!r}; fields found: {found}"
        raise BadRow("missing_field", problem, f"dataset.column_map.{name}=COLUMN")
    value = row.get(column)
    if value is None and optional:
        return None
    if wanted == "text" and not isinstance(value, str):
        raise BadRow("wrong_type", _wrong_type(name, column, "text", value))
    if wanted == "list" and not isinstance(value, list):
        raise BadRow("wrong_type", _wrong_type(name, column, "a list", value))
    if isinstance(value, str):
        require_characters(value, f"field {column!r} of {{row}}")
    return value


def _wrong_type(name: str, column: str, wanted: str, value: Any) -> str:
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    kind = "null" if value is None else f"{type(value).__name__}: {shown}"
    return f"field {column!r} ({name}) of {{row}} must be {wanted}, but is {kind}"


class Absent:
    """Looks for fields that a row may lack, but hardly all rows do: more likely their column is a misspelt one.

    Attributes:
        columns: of the fields that no row had so far.
        found: the columns of the first row; None while there was none that has any.
    """

    def __init__(self, format: Format, columns: Mapping[str, str]):
        self.columns = {name: column for name, column in columns.items() if format.fields[name].endswith("?")}
        self.found: list[str] | None = None

    def look_at(self, rows: Sequence[NumberedRow]) -> None:
        """Take note of what ``rows`` have."""
        objects = [row for _, row in rows if isinstance(row, Mapping)] if self.columns or self.found is None else []
        if objects and self.found is None:
            self.found = list(map(str, objects[0]))
        self.columns = {
            name: column for name, column in self.columns.items() if not any(column in row for row in objects)
        }


def located(bad: BadRow, number: int, where: str) -> Problem:
    row = f"row {number} of {where}"
    said = bad.problem.replace("{row}", row, 1) if "{row}" in bad.problem else f"{row} {bad.problem}"
    return Problem(bad.kind, number, f"dataset: {said}" + (f"\n  try: {bad.fix}" if bad.fix else ""))
