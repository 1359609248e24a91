"""What an offline run of W&B holds, in W&B's own message types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_offline_run(folder: Path) -> list[Any]:
    """The records of the one offline run in a run's folder."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return read_file(path)


def read_file(path: Path) -> list[Any]:
    """The records of a ``.wandb`` file.

    A LevelDB log behind a 7-byte header: 32 KiB blocks of chunks (crc 4, length 2, type 1), a record being one chunk
    of type 1, or a first (2), any number of middle (3) and a last one (4).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block's tail too short for a chunk is padding
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(parts))
            parts = b""
    return records


def items(update: Any) -> dict[str, Any]:
    """Key and value of the items of a history row, a summary or a configuration."""
    return {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in update}


def rows_of(records: list[Any]) -> list[dict[str, Any]]:
    """The rows of the history."""
    return [items(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]


def summary_of(records: list[Any]) -> dict[str, Any]:
    """The summary, as it was in the end."""
    summary: dict[str, Any] = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            summary |= items(record.summary.update)
    return summary
