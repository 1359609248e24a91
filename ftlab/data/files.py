"""Local files of rows: found, opened whatever they are compressed with, and read as a stream."""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from ftlab.data.problems import Problem
from ftlab.data.strict_json import OnProblem, invalid_utf8, json_rows
from ftlab.errors import ConfigError, DataError

# What each format's files are called in a folder; beside it, the same with a compression's suffix.
FILE_FORMATS = {
    "json": (".json", ".jsonl", ".ndjson"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv",),
    "parquet": (".parquet",),
    "text": (".txt", ".md"),
    "documents": (".txt", ".md"),
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_CHUNK_ROWS = 1_000

NumberedRow = tuple[int, Any]
_Fault = tuple[int, int]  # a byte that is no UTF-8, and its offset in the file


def find_files(data_files: str | Sequence[str] | None, source: str, key: str = "dataset.data_files") -> list[Path]:
    """The files that paths, globs and folders name, in the order given; those of a glob or a folder by name.

    Args:
        key: of the configuration, that holds ``data_files``.

    Raises:
        ConfigError: for a name that leads to no file.
    """
    if not data_files:
        raise ConfigError(
            key,
            f"is {data_files!r}, but a file format as dataset.source needs files",
            f"{key}=/path/to/rows.json",
        )
    files: list[Path] = []
    for pattern in [data_files] if isinstance(data_files, str) else data_files:
        path = Path(pattern).expanduser()
        # A name that exists is taken as it stands: brackets in it are no pattern then.
        found = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        inside = [file for place in found for file in (_of_format(place, source) if place.is_dir() else [place])]
        if not inside:
            what = (
                f"no {source} file in the folder {path.absolute()}"
                if path.is_dir()
                else f"no file at {path.absolute()}"
            )
            raise ConfigError(key, what, f"{key}=/path/to/rows.json")
        for file in inside:
            if not file.is_file():  # a pipe can be read once only, and rows are read as often as they are needed
                raise ConfigError(key, f"{file} is not a regular file", "a file with its content")
        files += inside
    return files


def _of_format(folder: Path, source: str) -> list[Path]:
    names = {suffix + packed for suffix in FILE_FORMATS[source] for packed in ("", *_COMPRESSED)}
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name.endswith(tuple(names)))


def decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    """The content of ``raw``, by the suffix of its name."""
    match suffix:
        case ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        case ".bz2":
            return cast(BinaryIO, bz2.BZ2File(raw))
        case ".xz":
            return cast(BinaryIO, lzma.LZMAFile(raw))
        case ".zst":
            import pyarrow as pa

            return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"), 1 << 20)
        case _:
            return raw


def file_rows(
    source: str,
    file: Path,
    raw: BinaryIO,
    columns: Sequence[str] | None,
    on_problem: OnProblem,
    first_row: int,
    start: int = 0,
) -> Iterator[NumberedRow]:
    """Number and values of every row of one file; numbers go on from ``first_row``.

    Args:
        raw: the open file.
        start: rows with lower numbers are not wanted: of those, values may be None, and all but some numbers missing.
        columns: which are needed, where a format can leave the others unread; None: all.

    Raises:
        DataError: for a file that is damaged as a whole.
    """
    try:
        if source == "parquet":
            yield from _parquet_rows(file, raw, columns, on_problem, first_row, start)
            return
        stream = decompressed(raw, file.suffix)
        match source:
            case "json" | "jsonl":
                yield from json_rows(stream, str(file), on_problem, first_row, start)
            case "csv":
                yield from _csv_rows(stream, file, on_problem, first_row)
            case "text":
                yield from _text_rows(stream, file, on_problem, first_row)
            case "documents":
                faults: list[_Fault] = []
                text = "".join(_text_lines(stream, faults))
                if faults:
                    on_problem(invalid_utf8(str(file), *faults[0], first_row))
                else:
                    yield first_row, {"text": text}
    except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error) as error:
        raise DataError(f"dataset.data_files: {file} cannot be read as {source}: {error}") from error


def _text_lines(stream: BinaryIO, faults: list[_Fault]) -> Iterator[str]:
    """Lines of text; the first byte that is no UTF-8 in one is added to ``faults`` before the line comes, for a caller
    that leaves out what the line belongs to."""
    offset = 0
    for line in stream:  # a newline byte is never part of a longer character, so lines can be decoded alone
        content = line if offset else line.removeprefix(codecs.BOM_UTF8)
        try:
            yield content.decode()
        except UnicodeDecodeError as error:
            faults.append((content[error.start], offset + len(line) - len(content) + error.start))
            yield content.decode(errors="replace")
        offset += len(line)


def _text_rows(stream: BinaryIO, file: Path, on_problem: OnProblem, row: int) -> Iterator[NumberedRow]:
    faults: list[_Fault] = []
    for line in _text_lines(stream, faults):
        if faults:
            on_problem(invalid_utf8(str(file), *faults.pop(), row))
        elif line.strip():
            yield row, {"text": line.rstrip("\r\n")}
        else:
            continue
        row += 1


def _csv_rows(stream: BinaryIO, file: Path, on_problem: OnProblem, row: int) -> Iterator[NumberedRow]:
    """Every value is text: as a number, one would lose its leading zeros, and "NA" its letters."""
    csv.field_size_limit(2**31 - 1)
    faults: list[_Fault] = []
    reader = csv.reader(_text_lines(stream, faults), strict=True)
    header = next(reader, None)
    if faults:  # without its columns' names there is no row
        raise DataError(invalid_utf8(str(file), *faults[0], None).message)
    if header is None:
        return
    if len(set(header)) != len(header):
        raise DataError(f"dataset.data_files: {file} cannot be read as csv: a column's name stands twice in {header}")
    try:
        for fields in reader:
            if not fields:
                continue
            if faults:  # of any of the lines that the row is made of
                on_problem(invalid_utf8(str(file), *faults[0], row))
                faults.clear()
            elif len(fields) == len(header):
                yield row, dict(zip(header, fields, strict=True))
            else:
                what = f"line {reader.line_num} has {len(fields)} fields, the header {len(header)}"
                on_problem(Problem("ragged_csv", row, f"dataset.data_files: {file} cannot be read as csv: {what}"))
            row += 1
    except csv.Error as error:
        what = f"{error} (line {reader.line_num})"
        raise DataError(f"dataset.data_files: {file} cannot be read as csv: {what}") from error


def _parquet_rows(
    file: Path, raw: BinaryIO, columns: Sequence[str] | None, on_problem: OnProblem, row: int, start: int
) -> Iterator[NumberedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(raw)
        groups = list(range(table.num_row_groups))
        while groups and row + (n := table.metadata.row_group(groups[0]).num_rows) <= start:
            row += n
            yield row - 1, None
            del groups[0]
        wanted = readable(columns, table.schema_arrow.names)
        for batch in table.iter_batches(_CHUNK_ROWS, row_groups=groups, columns=wanted):
            yield from arrow_rows(batch, str(file), on_problem, row)
            row += len(batch)
    except (pa.ArrowException, OSError) as error:
        text = str(error).strip().splitlines()
        reason = text[0] if text else type(error).__name__
        raise DataError(f"dataset.data_files: {file} cannot be read as parquet: {reason}") from error


def readable(columns: Sequence[str] | None, found: Sequence[str]) -> list[str] | None:
    """The columns to read; all (None) where one is missing, so that the error can tell what there is."""
    return list(columns) if columns and set(columns) <= set(found) else None


def arrow_rows(batch: Any, name: str, on_problem: OnProblem, row: int) -> Iterator[NumberedRow]:
    """The rows of an Arrow batch; a column whose bytes are no UTF-8 costs only the rows that hold them."""
    try:
        yield from enumerate(batch.to_pylist(), row)
    except UnicodeDecodeError:
        for i in range(len(batch)):
            try:
                values = batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                where = f"{name} is not UTF-8: byte 0x{byte:02x} at byte {error.start} of a text in row {row + i}"
                on_problem(Problem("invalid_utf8", row + i, f"dataset.data_files: {where}"))
            else:
                yield row + i, values
