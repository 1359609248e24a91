"""Tensors in several safetensors files, each holding some rows of them: written by all ranks, read by any number.

Every file says in its header which rows (dim 0) of which whole tensor it holds. So a reader that wants other rows
than a writer had finds them, whatever the numbers of ranks were.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ftlab.errors import CheckpointError
from ftlab.models.safetensors_stream import DTYPES, SafetensorsWriter
from ftlab.models.shards import own_rows
from ftlab.models.stored import StoredTensor
from ftlab.storage.disk import DurableFile

_ROWS = "rows"  # the header's entry: JSON of name -> [first row, rows of the whole tensor], null for a scalar


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor: their values, where they begin, how many the whole has; null for a scalar."""

    values: Tensor
    start: int
    n_rows: int | None


def take_rows(tensors: Mapping[str, Tensor], into: dict[str, Tensor] | None = None) -> dict[str, Rows]:
    """This rank's rows of ``tensors``, those that it has to write; views, or copies on the host.

    Args:
        into: where to copy, name -> tensor on the host; what is there already is used again, since fresh pages
            cost more than the copy. From a GPU the copies arrive later: synchronize. Null: no copies.
    """
    taken = {}
    for name, tensor in tensors.items():
        values, rows = own_rows(tensor)
        if into is not None:
            place = into.get(name)
            if place is None or place.shape != values.shape or place.dtype != values.dtype:
                place = into[name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            values = place.copy_(values, non_blocking=True)
        if len(values):
            taken[name] = Rows(values, rows.start, tensor.shape[0] if tensor.ndim else None)
    return taken


def write_rows(file: DurableFile, tensors: Mapping[str, Rows]) -> None:
    """Write ``tensors`` into a new safetensors file."""
    where = {name: None if rows.n_rows is None else [rows.start, rows.n_rows] for name, rows in tensors.items()}
    announced = {name: (tuple(rows.values.shape), rows.values.dtype) for name, rows in tensors.items()}
    writer = SafetensorsWriter(file, announced, {_ROWS: json.dumps(where)})
    for rows in tensors.values():
        writer.write(rows.values.cpu())
    writer.finish()


@dataclass(frozen=True)
class StoredRows(StoredTensor):
    """A whole tensor in those files, with its dtype; a scalar is read as one row."""

    dtype: torch.dtype


@dataclass(frozen=True)
class _Part:
    path: Path
    start: int
    stop: int
    n_rows: int | None  # of the whole; a scalar has none
    shape: tuple[int, ...]  # of one row
    dtype: torch.dtype


def open_rows(paths: Iterable[Path]) -> dict[str, StoredRows]:
    """The whole tensors that the files together hold; only headers are read.

    Raises:
        CheckpointError: for a file that is none of these, or parts that do not make whole tensors.
    """
    parts: dict[str, list[_Part]] = {}
    for path in paths:
        for name, part in _parts(path).items():
            parts.setdefault(name, []).append(part)
    return {name: _whole(name, sorted(those, key=lambda part: part.start)) for name, those in parts.items()}


def _parts(path: Path) -> dict[str, _Part]:
    named = {text: dtype for dtype, text in DTYPES.items()}
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            where = json.loads((file.metadata() or {})[_ROWS])
            for name in file.keys():  # noqa: SIM118 -- a safetensors handle, not a dict
                view = file.get_slice(name)
                n, *row = view.get_shape()
                start, n_rows = where[name] or (0, None)
                found[name] = _Part(path, start, start + n, n_rows, tuple(row), named[view.get_dtype()])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(path, f"is not a file of a checkpoint's tensors: {error}") from None
    return found


def _whole(name: str, parts: list[_Part]) -> StoredRows:
    first, end = parts[0], 0
    for part in parts:
        same = (part.n_rows, part.shape, part.dtype) == (first.n_rows, first.shape, first.dtype)
        if part.start != end or not same:
            raise CheckpointError(part.path, f"does not fit the other files: {name} from row {part.start} on")
        end = part.stop
    n_rows = 1 if first.n_rows is None else first.n_rows
    if end != n_rows:
        raise CheckpointError(parts[-1].path, f"ends {name} at row {end} of {n_rows}: a file is missing")

    def read(rows: slice) -> Tensor:
        start, stop, _ = rows.indices(n_rows)
        pieces = []
        for part in parts:
            low, high = max(start, part.start), min(stop, part.stop)
            if low < high:
                with safe_open(part.path, framework="pt") as file:
                    pieces.append(file.get_slice(name)[low - part.start : high - part.start])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    shape = () if first.n_rows is None else (n_rows, *first.shape)
    return StoredRows(shape, read, first.dtype)
