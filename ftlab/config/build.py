"""From a configuration node to the object that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ftlab.config.targets import CONTROL, locate, nodes, parameter_name

Config = dict[str, Any]  # composed, resolved, in plain containers


def build(node: Mapping[str, Any], **runtime: Any) -> Any:
    """Build what ``node["_target_"]`` names from the node's other keys; nodes inside it are built first.

    Hydra's ``_target_`` and ``_partial_`` by their meaning, not by ``hydra.utils.instantiate``: that one puts
    every argument through OmegaConf, which turns lists into its own, refuses tensors, and reads text such as
    ``"Q: ${question}"`` as an interpolation once more.

    Args:
        node: plain and resolved. With ``_partial_: true`` the result is a callable that waits for the rest.
        runtime: what no configuration can hold (parameters, a tokenizer). With any of it the target is called
            now, ``_partial_`` or not.

    Raises:
        ConfigError: when a target is not in the allowlist; none is called then.
    """
    assert "_target_" in node, f"not a node to build, it has no _target_: {dict(node)}"
    for key, inside in nodes(node):
        locate(inside["_target_"], key)
    return _make(node, runtime)


def _make(node: Mapping[str, Any], runtime: Mapping[str, Any]) -> Any:
    target = locate(node["_target_"], "")
    arguments = {parameter_name(name): _arguments(value) for name, value in node.items() if name not in CONTROL}
    if node.get("_partial_", False) and not runtime:
        return partial(target, **arguments)
    return target(**arguments, **runtime)


def _arguments(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        if "_target_" in tree:
            return _make(tree, {})
        return {key: _arguments(value) for key, value in tree.items()}
    return [_arguments(value) for value in tree] if isinstance(tree, list) else tree
