"""From a composed configuration to plain Python values, with interpolations followed and the broken ones named."""

from __future__ import annotations

import re
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ftlab.config.layers import leaves
from ftlab.errors import ConfigError

# A reference to another key. ${name:...} is a resolver's call; the references among its arguments match by themselves.
_REFERENCE = re.compile(r"\$\{([^${}:]+)\}")


def resolve(cfg: DictConfig) -> tuple[dict[str, Any], list[ConfigError]]:
    """Everything of ``cfg`` but Hydra's own node, as dicts, lists and scalars.

    Returns:
        The values, without the keys that have none; and for those keys, why.
    """
    problems: list[ConfigError] = []
    raw = dict(leaves({key: _raw(cfg, key) for key in cfg if key != "hydra"}))
    values = {str(key): value for key, value in _resolve(cfg, "", raw, problems).items() if key != "hydra"}
    return values, problems


def _raw(cfg: DictConfig, key: Any) -> Any:
    node = cfg._get_node(key)
    return OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else node._value()  # type: ignore[union-attr]


def _resolve(node: DictConfig, prefix: str, raw: dict[str, Any], problems: list[ConfigError]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in node:
        key = prefix + str(name)
        if key == "hydra":
            continue
        try:
            value = node[name]
            if isinstance(value, ListConfig):
                value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            values[str(name)] = _resolve(value, f"{key}.", raw, problems) if isinstance(value, DictConfig) else value
        except MissingMandatoryValue:
            problems.append(ConfigError(key, "must be given, it has no default", f"{key}=..."))
        except OmegaConfBaseException as error:
            problems.append(ConfigError(key, _why(key, raw, str(error))))
    return values


def _why(key: str, raw: dict[str, Any], told: str) -> str:
    chain = broken_chain(key, raw)
    if chain is None:
        return f"{raw.get(key)} cannot be resolved: {told.splitlines()[0]}"
    shown = " -> ".join(chain)
    return f"refers to itself: {shown}" if chain[-1] in chain[:-1] else f"refers to a key that does not exist: {shown}"


def broken_chain(key: str, raw: dict[str, Any], seen: tuple[str, ...] = ()) -> list[str] | None:
    """The references from ``key`` to one that is missing or that closes a cycle; None when all lead somewhere."""
    path = (*seen, key)
    if key in seen:
        return list(path)
    if key not in raw:
        is_mapping = any(known.startswith(f"{key}.") for known in raw)
        return None if is_mapping else list(path)
    for reference in _REFERENCE.findall(str(raw[key])):
        if (chain := broken_chain(absolute(reference, key), raw, path)) is not None:
            return chain
    return None


def absolute(reference: str, key: str) -> str:
    """The key that ``reference`` means inside of ``key``: ``.a`` is a neighbour, ``..a`` one of the parent's."""
    name = reference.lstrip(".")
    dots = len(reference) - len(name)
    return ".".join([*key.split(".")[:-dots], name]) if dots else name
