"""A torchtune configuration as torchtune reads it: the YAML file, its command line over it, interpolations resolved."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ftlab.config.compose import hydra_errors
from ftlab.errors import ConfigError

_COMPONENT = "_component_"
_RECIPE = re.compile(r"\b(\w+_(?:single_device|distributed))\b")


def read_torchtune_file(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """The resolved tree, and the recipe that the file's comments name (the file itself does not say).

    Args:
        overrides: as ``tune run`` takes them: ``key=value``, ``component=dotted.path``, ``~key`` takes it out.

    Raises:
        ConfigError, ConfigErrors: there is no such file, it is not a YAML mapping, or an override cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        problem = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(str(path), problem, "tune cp llama2/7B_full CONFIG.yaml") from error
    with hydra_errors():
        config = OmegaConf.create(text)
    if not isinstance(config, DictConfig):
        raise ConfigError(str(path), "is not a torchtune configuration: no mapping of keys to values")
    for override in overrides:
        _apply(config, override)
    with hydra_errors():
        tree = OmegaConf.to_container(config, resolve=True)
    assert isinstance(tree, dict)
    comments = "\n".join(line for line in text.splitlines() if line.lstrip().startswith("#"))
    named = _RECIPE.search(comments)
    return {str(key): value for key, value in tree.items()}, named.group(1) if named else None


def _apply(config: DictConfig, override: str) -> None:
    key, equals, value = override.partition("=")
    if override.startswith("~"):
        parent, _, last = override[1:].rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        if not isinstance(node, DictConfig) or last not in node:
            raise ConfigError(override, "takes out a key that is not there")
        del node[last]
    elif not equals or not key:
        raise ConfigError(override, "is not an override; those read key=value or ~key")
    else:
        if isinstance(node := OmegaConf.select(config, key), DictConfig) and _COMPONENT in node:
            key = f"{key}.{_COMPONENT}"
        with hydra_errors():
            config.merge_with(OmegaConf.from_dotlist([f"{key}={value}"]))
