"""Rows of instruction data: from local files and the Hub, checked before anything is tokenised.

Rows come out as one Arrow table of text columns, whatever they came from, numbered from 0 in the order of the
source. csv, parquet and Hub sets are read with ``datasets``. json is read here, strictly: ``datasets`` turns
columns of mixed types into JSON text without a word (a list would be taught as '["a"]'), and tells neither
the line of a syntax error nor the row of a missing field.
"""

from __future__ import annotations

import csv
import glob
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from ftlab.data.tiny import tiny_rows
from ftlab.errors import ConfigError, DataError

FIELDS = ("instruction", "input", "output", "family")
_FILE_FORMATS = ("json", "jsonl", "csv", "parquet")
_CHUNK_ROWS = 10_000  # rows held as Python objects at a time
_HUB_TIMEOUT_S = 10


class Rows(NamedTuple):
    """Tables of text columns, ``FIELDS`` as far as they are mapped; ``validation`` where a source brings its own."""

    train: pa.Table
    validation: pa.Table | None


def read_rows(
    *,
    source: str,
    data_files: str | Sequence[str] | None,
    split: str,
    column_map: dict[str, str | None],
) -> Rows:
    """Read the rows of a set and check every one of them.

    Args:
        source: ``tiny``, a file format (``json``, ``jsonl``, ``csv``, ``parquet``), or the id of a set on the Hub.
        data_files: path, glob, or list of them; only for a file format.
        split: which split of a set on the Hub.
        column_map: the source's column for each of ``FIELDS``; null for a field that the set does not have,
            which only ``input`` and ``family`` may be.

    Raises:
        ConfigError: if the values contradict each other, or no such files or set can be found.
        DataError: if a row cannot be used; the message names file, row and field.
    """
    columns = _mapped_columns(column_map)
    if source not in _FILE_FORMATS and data_files is not None:
        raise ConfigError(
            "dataset.data_files",
            f"{data_files!r} would not be read: dataset.source={source} is none of the file formats "
            f"{', '.join(_FILE_FORMATS)}",
            "dataset.source=json",
        )
    if source == "tiny":
        train, validation = (pa.Table.from_pylist([row._asdict() for row in rows]) for rows in tiny_rows())
        return Rows(_pick(train, columns, source), _pick(validation, columns, source))
    if source in _FILE_FORMATS:
        table = _read_files(source, _find_files(data_files), columns)
    else:
        table = _pick(_load_from_hub(source, split), columns, source)
    if len(table) == 0:
        raise DataError(f"dataset: source={source} data_files={data_files} holds no rows")
    return Rows(table, None)


def _read_files(source: str, files: Sequence[Path], columns: dict[str, str]) -> pa.Table:
    if source != "parquet":
        for file in files:
            _require_utf8(file)
    if source in ("json", "jsonl"):
        return _read_json(files, columns)
    table = _load_files(source, files)
    return pa.table({}) if table is None else _pick(table, columns, ", ".join(map(str, files)))


def _mapped_columns(column_map: dict[str, str | None]) -> dict[str, str]:
    """Field to column, for the fields that the source has."""
    if unknown := sorted(set(column_map) - set(FIELDS)):
        raise ConfigError(f"dataset.column_map.{unknown[0]}", f"is no field; the fields are {', '.join(FIELDS)}")
    for field in ("instruction", "output"):
        if column_map.get(field) is None:
            raise ConfigError(
                f"dataset.column_map.{field}",
                "is null, and every row needs this field",
                f"dataset.column_map.{field}=COLUMN",
            )
    return {field: column for field in FIELDS if (column := column_map.get(field)) is not None}


# ---- files -----------------------------------------------------------------------------------------------


def _find_files(data_files: str | Sequence[str] | None) -> list[Path]:
    if not data_files:
        raise ConfigError(
            "dataset.data_files",
            f"is {data_files!r}, but a file format as dataset.source needs files",
            "dataset.data_files=/path/to/rows.json",
        )
    patterns = [data_files] if isinstance(data_files, str) else data_files
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        # A name that exists is taken as it stands: brackets in it are no pattern then.
        found = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        found = [file for file in found if file.is_file()]
        if not found:
            raise ConfigError(
                "dataset.data_files",
                f"no file at {path.absolute()}",
                "dataset.data_files=/path/to/rows.json",
            )
        files += found
    return files


def _require_utf8(file: Path) -> None:
    offset = 0
    with file.open("rb") as lines:
        for line in lines:  # a newline byte is never part of a longer character, so lines can be checked alone
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"dataset.data_files: {file} is not UTF-8: byte 0x{line[error.start]:02x} "
                    f"at byte offset {offset + error.start}\n"
                    f"  try: iconv -f latin1 -t utf-8 {file} > fixed{file.suffix}"
                ) from error
            offset += len(line)


def _read_json(files: Sequence[Path], columns: dict[str, str]) -> pa.Table:
    """An array of rows, or one row per line, told apart by the first character."""
    schema = pa.schema([(field, pa.string()) for field in columns])
    chunks, first_row = [], 0
    for file in files:
        records = _json_records(file)
        while chunk := list(itertools.islice(records, _CHUNK_ROWS)):
            values = [_row_values(record, columns, f"row {first_row + i} of {file}") for i, record in enumerate(chunk)]
            chunks.append(pa.RecordBatch.from_pylist(values, schema=schema))
            first_row += len(chunk)
    return pa.Table.from_batches(chunks, schema=schema)


def _json_records(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8-sig") as text:
        start = text.read(1)
        while start.isspace():
            start = text.read(1)
        text.seek(0)
        if start == "[":
            yield from _parse_json(text.read(), file, 1)
            return
        for number, line in enumerate(text, start=1):
            if line.strip():
                yield _parse_json(line.rstrip("\n"), file, number)


def _parse_json(text: str, file: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"dataset.data_files: {file}:{line}:{error.colno}: broken JSON: {error.msg} "
            "(expected one array of rows, or one row per line)"
        ) from error


def _row_values(record: Any, columns: dict[str, str], where: str) -> dict[str, str]:
    if not isinstance(record, dict):
        raise DataError(f"dataset: {where} is a {type(record).__name__}, not an object with fields")
    values = {}
    for field, column in columns.items():
        if column not in record:
            raise DataError(_missing(field, column, where, record))
        value = record[column]
        if value is None and field == "input":
            value = ""
        if not isinstance(value, str):
            raise DataError(_wrong_type(field, column, where, type(value).__name__, value))
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
            raise DataError(
                f"dataset: field {column!r} of {where} holds half a surrogate pair: {value[error.start]!r}"
            ) from error
        values[field] = value
    return values


# ---- datasets: csv, parquet, Hub -------------------------------------------------------------------------


def _load_files(source: str, files: Sequence[Path]) -> pa.Table | None:
    """The files' table, or nothing where they hold no rows."""
    names = [str(file) for file in files]

    def load() -> Any:
        import datasets

        options: dict[str, Any] = {}
        if source == "csv":  # every value is text, else a number would lose its leading zeros and "NA" its letters
            header = _csv_header(files[0])
            options["features"] = datasets.Features({name: datasets.Value("string") for name in header})
            options["keep_default_na"] = False
        # In memory and in a cache of its own, which goes at once: an edited file is never shadowed by a stale copy.
        with tempfile.TemporaryDirectory(prefix="ftlab-") as cache:
            return datasets.load_dataset(
                source, data_files=names, split="train", cache_dir=cache, keep_in_memory=True, **options
            )

    if all(file.stat().st_size == 0 for file in files):
        return None
    try:
        return _quietly(load)
    except Exception as error:  # each format's reader raises its own kinds, wrapped once or twice
        if "corresponds to no data" in str(error):  # what `datasets` says of files without rows
            return None
        raise DataError(
            f"dataset.data_files: {', '.join(names)} cannot be read as {source}: {_root_cause(error)}"
        ) from error


def _csv_header(file: Path) -> list[str]:
    with file.open(encoding="utf-8-sig", newline="") as text:
        return next(csv.reader(text), [])


def _load_from_hub(repo_id: str, split: str) -> pa.Table:
    def load() -> Any:
        import datasets
        from huggingface_hub import HfApi, constants

        if not constants.HF_HUB_OFFLINE:
            # A plain request first: it fails at once without a network, where `datasets` retries for 20 s.
            HfApi().dataset_info(repo_id, timeout=_HUB_TIMEOUT_S)
        return datasets.load_dataset(repo_id, split=split, keep_in_memory=True)

    try:
        return _quietly(load)
    except Exception as error:  # the Hub's client, its HTTP library and `datasets` each raise their own kinds
        raise ConfigError(
            "dataset.source",
            f"the set {repo_id!r} (split {split!r}) cannot be had from the Hub: {_root_cause(error)}",
            "dataset.source=json dataset.data_files=/path/to/a/local/copy.json   "
            "(a gated set also needs HF_TOKEN; HF_HUB_OFFLINE=1 uses the Hub's cache on this machine)",
        ) from error


def _quietly(load: Callable[[], Any]) -> pa.Table:
    """The table of the set that ``load`` returns; the bars and log lines of ``datasets`` stay off."""
    import datasets

    bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs on failure is in our error too
    try:
        return load().with_format("arrow")[:]
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _pick(table: pa.Table, columns: dict[str, str], source: str) -> pa.Table:
    """The mapped columns under their fields' names, checked to hold text in every row."""
    picked = {}
    for field, column in columns.items():
        if column not in table.column_names:
            raise DataError(_missing(field, column, f"every row of {source}", table.column_names))
        values = table.column(column)
        if pa.types.is_null(values.type) and field == "input":
            values = pa.chunked_array([[""] * len(table)], pa.string())
        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            first = values[0].as_py() if len(values) else None
            raise DataError(_wrong_type(field, column, f"row 0 of {source}", str(values.type), first))
        if values.null_count:
            if field == "input":
                values = values.fill_null("")
            else:
                row = values.is_null().index(True).as_py()
                raise DataError(_wrong_type(field, column, f"row {row} of {source}", "null", None))
        picked[field] = values.cast(pa.string())
    return pa.table(picked)


def _missing(field: str, column: str, where: str, found: Any) -> str:
    hint = "dataset.column_map.input=null" if field == "input" else f"dataset.column_map.{field}=COLUMN"
    return f"dataset: {where} has no field {column!r}; fields found: {', '.join(map(str, found))}\n  try: {hint}"


def _wrong_type(field: str, column: str, where: str, kind: str, value: Any) -> str:
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return f"dataset: field {column!r} ({field}) of {where} must be text, but is {kind}: {shown}"
