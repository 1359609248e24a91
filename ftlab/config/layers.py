"""The files a configuration is made of, in order of precedence: who says what, and on which line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.default_element import ResultDefault
from omegaconf import OmegaConf

from ftlab.config.mixtures import SETS


@dataclass(frozen=True)
class Setting:
    """One leaf of one file: its raw value (interpolations unresolved) and ``conf/optimizer/adamw.yaml:9``."""

    value: Any
    where: str


@dataclass(frozen=True)
class Layer:
    """One file's share of the configuration.

    A layer up to the primary config *defines* keys; what comes after it (experiment, local, debug) may only
    change them, so that a misspelt key in a recipe is an error like one on the command line.

    Attributes:
        package: below which key its own go; empty where it was ``@package _global_``.
        picks: the groups of which the file's defaults list picks an option.
    """

    name: str
    defines: bool
    settings: dict[str, Setting]
    package: str = ""
    picks: frozenset[str] = frozenset()


def read_layers(loader: ConfigLoaderImpl, defaults: list[ResultDefault], primary: str) -> list[Layer]:
    """The files behind Hydra's final defaults list, weakest first. Hydra's own are left out."""
    roots = [Path(source.path) for source in loader.get_sources() if source.scheme() == "file"]
    layers: list[Layer] = []
    defines = True
    for default in defaults:
        path = default.config_path
        if path is None or path.startswith("hydra/"):
            continue
        file = next((root / f"{path}.yaml" for root in roots if (root / f"{path}.yaml").is_file()), None)
        if file is None:
            continue
        package = (default.package or "").removeprefix("_global_").lstrip(".")
        settings = _read(file, f"{file.parents[path.count('/')].name}/{path}.yaml", package)
        placed = package.startswith(f"{SETS}.")  # one of a mixture's sets, from the command line too
        layers.append(Layer(path, defines or placed, settings, package, _picks(file)))
        defines = defines and path != primary
    return layers


def _picks(file: Path) -> frozenset[str]:
    content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    named = (str(key) for entry in content.get("defaults") or [] if isinstance(entry, dict) for key in entry)
    return frozenset(name.removeprefix("override").strip().lstrip("/").partition("@")[0] for name in named)


def _read(file: Path, shown: str, package: str) -> dict[str, Setting]:
    prefix = f"{package}." if package else ""
    parsed = {prefix + key: found for key, found in _parse(file.read_text(encoding="utf-8")).items()}
    return {key: Setting(value, f"{shown}:{line}") for key, (value, line) in parsed.items() if not _is_hydras(key)}


def _is_hydras(key: str) -> bool:
    return key.partition(".")[0] == "hydra"


@cache  # by text: the jobs of a sweep are made of the same files
def _parse(text: str) -> dict[str, tuple[Any, int]]:
    content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    assert isinstance(content, dict), f"an option is a mapping, not {content!r}"
    lines = dict(_lines(yaml.compose(text, Loader=yaml.SafeLoader)))
    content.pop("defaults", None)
    return {key: (value, lines.get(key, 1)) for key, value in leaves(content)}  # a merged key (<<) has no line


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that is not a non-empty mapping; a list is one value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield prefix + key.value, key.start_mark.line + 1
            yield from _lines(value, f"{prefix}{key.value}.")
