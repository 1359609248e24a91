"""Small files, written so that every reader can open them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """YAML that Hydra reads back with the same types."""


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML leaves "1e3" bare because YAML 1.1 reads it as a string; OmegaConf reads it as a number.
    try:
        float(text)
    except ValueError:
        return yaml.SafeDumper.represent_str(dumper, text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Dumper.add_representer(str, _represent_str)


def to_yaml(obj: Any) -> str:
    return yaml.dump(obj, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _finite(obj: Any) -> Any:
    """JSON has no NaN or infinity: they become null, so that every reader can open the file."""
    match obj:
        case float():
            return obj if math.isfinite(obj) else None
        case Mapping():
            return {key: _finite(value) for key, value in obj.items()}
        case list() | tuple():
            return [_finite(item) for item in obj]
        case _:
            return obj


def to_json(obj: Any, *, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinity become null, a path becomes a string."""
    return json.dumps(_finite(obj), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object a line."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rows)


def shortest(path: Path) -> Path:
    """The path as a person would type it: relative to where they stand, when it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
