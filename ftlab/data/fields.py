"""The fields of a row: which column each comes from, and whether it holds what the format needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
    """Number and fields of every row that has them all, each of its kind."""
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


def located(bad: BadRow, number: int, where: str) -> Problem:
    row = f"row {number} of {where}"
    said = bad.problem.replace("{row}", row, 1) if "{row}" in bad.problem else f"{row} {bad.problem}"
    return Problem(bad.kind, number, f"dataset: {said}" + (f"\n  try: {bad.fix}" if bad.fix else ""))
