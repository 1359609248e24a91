"""Small files, written so that every reader can open them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ftlab.storage.disk import read_small_file

MAX_BYTES = 64 * 2**20  # of a file about a run


class _Dumper(yaml.SafeDumper):
    """YAML that Hydra reads back with the same types."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML leaves "1e3" bare because YAML 1.1 reads it as a string; OmegaConf reads it as a number.
    try:
        float(text)
    except ValueError:
        return yaml.SafeDumper.represent_str(dumper, text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Dumper.add_representer(str, _represent_str)


class _Loader(yaml.SafeLoader):
    """Plain values, and none of them twice: a few lines of aliases can stand for a billion values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "an alias, which ftlab neither writes nor reads", mark)
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """What a YAML file of a run says, whoever wrote it: nothing in it is called, resolved or repeated.

    Raises:
        OSError, ValueError: it cannot be read, or is something else.
    """
    try:
        return yaml.load(read_small_file(path, MAX_BYTES).decode("utf-8"), Loader=_Loader)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from None


def read_json(path: Path) -> Any:
    """What a JSON file of a run says, whoever wrote it.

    Raises:
        OSError, ValueError: it cannot be read, or is something else.
    """
    try:
        return json.loads(read_small_file(path, MAX_BYTES).decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


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
