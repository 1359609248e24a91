"""The objects a configuration names in ``_target_``: which are allowed, and whether their arguments fit.

``_target_`` is code that a text file runs, so the list of what may run is short, and it is checked twice: the
name before anything is imported, and the object that the name led to (``ftlab.outputs.folder.os.system`` begins well).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import keyword
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ftlab.errors import ConfigError
from ftlab.typed import override

# The rooms whose classes only compute. Those of others, ftlab's own too, make folders and files when they are built.
_ROOMS = ("data", "distributed", "lab", "loggers", "losses", "models", "optim", "training")
_ALLOWED = re.compile(rf"ftlab\.({'|'.join(_ROOMS)})(\.[A-Za-z]\w*)+|torch\.optim\.[A-Z]\w*")
_ALLOWED_FOR_HYDRA = re.compile(r"(hydra\._internal\.core_plugins|hydra_plugins)(\.\w+)+")
_RULE = f"allowed are the classes of ftlab.{{{','.join(_ROOMS)}}} and the optimizers of torch.optim"
CONTROL = frozenset({"_target_", "_partial_"})  # Hydra's _args_, _convert_, _recursive_ have no use here


# Classes that earlier versions had elsewhere, by the names that stand in the configurations their runs have kept.
MOVED = {
    "ftlab.models.transformer.ModelConfig": "ftlab.models.config.ModelConfig",
    "ftlab.training.loop.TrainerConfig": "ftlab.training.trainer_config.TrainerConfig",
}


def in_todays_names(tree: Any, depth: int = 64) -> Any:
    """A copy of a configuration that a run has kept, in which every ``_target_`` has the name it goes by now.

    Args:
        depth: the most levels it may have; ftlab's own have a handful, and what is far deeper ends Python's stack.

    Raises:
        ValueError: it has more.
    """
    if not isinstance(tree, (Mapping, list)):
        return tree
    if depth == 0:
        raise ValueError("nested too deeply")
    if isinstance(tree, list):
        return [in_todays_names(child, depth - 1) for child in tree]
    copy = {key: in_todays_names(value, depth - 1) for key, value in tree.items()}
    if isinstance(target := copy.get("_target_"), str):
        copy["_target_"] = MOVED.get(target, target)
    return copy


def nodes(tree: Any, key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Dotted key and node of every mapping with a ``_target_``, at any depth, in lists too."""
    if isinstance(tree, Mapping):
        if "_target_" in tree:
            yield key, tree
        for name, child in tree.items():
            yield from nodes(child, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for i, child in enumerate(tree):
            yield from nodes(child, f"{key}[{i}]")


def parameter_name(key: str) -> str:
    """The parameter that a key stands for: Python reserves some words, ``async`` is ``async_`` there."""
    return f"{key}_" if keyword.iskeyword(key) else key


def forbidden(tree: Any, key: str = "", *, for_hydra: bool = False) -> Iterator[ConfigError]:
    """The targets in ``tree`` whose name is not in the allowlist. Imports nothing."""
    for where, node in nodes(tree, key):
        target = node["_target_"]
        allowed = isinstance(target, str) and (
            _ALLOWED.fullmatch(target) or (for_hydra and _ALLOWED_FOR_HYDRA.fullmatch(target))
        )
        if not allowed:
            yield ConfigError(f"{where}._target_".lstrip("."), f"{target!r} is not in the allowlist: {_RULE}")


# Every run has them, and whatever builds one of them asks what it is.
_GROUPS = (
    *("model", "tokenizer", "dataset", "loss", "optimizer", "scheduler", "precision", "parallelism", "trainer"),
    *("checkpoint", "evaluation"),
)


def unnamed(config: Mapping[str, Any]) -> Iterator[ConfigError]:
    """The groups, and the loggers, that do not say what they are: nobody would look at what else they say.

    And loggers, whose names are free, with one that no key of theirs could be told or typed by.
    """
    loggers = config.get("logger")
    for name in loggers if isinstance(loggers, Mapping) else ():
        if not re.fullmatch(r"[\w-]+", str(name)):
            plain = re.sub(r"[^\w-]+", "_", str(name)).strip("_") or "mine"
            yield ConfigError(f"logger.{name}", "no override can name it: letters, digits, _ and - can be", f"{plain}:")
    named = {group: config.get(group) for group in _GROUPS}
    named |= {f"logger.{name}": node for name, node in loggers.items()} if isinstance(loggers, Mapping) else {}
    for key, node in named.items():
        if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
            yield ConfigError(f"{key}._target_", "is missing: it says what this is")


def locate(target: str, key: str) -> type:
    """Import the class that ``target`` names, which an allowed package must itself define.

    A class, because building one is all that a configuration is for: a function may do anything, write a file too.

    Raises:
        ConfigError: when it is not in the allowlist, does not exist or cannot be imported.
    """
    for problem in forbidden({"_target_": target}, key):
        raise problem
    key = f"{key}._target_".lstrip(".")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except AttributeError:
        names = dir(importlib.import_module(module))
        nearest = (f"{module}.{one}" for one in difflib.get_close_matches(name, names, n=1))
        fix = MOVED.get(target) or next(nearest, None)
        raise ConfigError(key, f"{module} has no {name}", fix) from None
    except ImportError as error:
        raise ConfigError(key, f"{target} cannot be imported: {error}") from error
    home = str(getattr(found, "__module__", ""))
    package = "torch.optim" if target.startswith("torch.") else "ftlab"
    if not inspect.isclass(found) or not f"{home}.".startswith(f"{package}."):
        kind = f"{'a class' if inspect.isclass(found) else 'no class'} of {home or 'no module'}"
        raise ConfigError(key, f"{target!r} is not in the allowlist: it is {kind}, {_RULE}")
    return found


def misfits(tree: Any, key: str = "") -> Iterator[ConfigError]:
    """Where the arguments of a node are not those of its target. Imports the targets, so torch too.

    A ``_partial_`` node may lack arguments: the others arrive at run time.
    """
    for where, node in nodes(tree, key):
        try:
            target = locate(node["_target_"], where)
        except ConfigError as problem:
            yield problem
            continue
        yield from _unbound(target, node, where)


def _unbound(target: type, node: Mapping[str, Any], where: str) -> Iterator[ConfigError]:
    parameters = inspect.signature(target).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    given = {parameter_name(str(name)): value for name, value in node.items() if name not in CONTROL}
    for name, value in given.items():
        if name not in named and not takes_any:
            nearest = difflib.get_close_matches(name, named, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            fix = override(f"{where}.{nearest[0]}", value) if nearest else None
            yield ConfigError(f"{where}.{name}", f"{node['_target_']} takes no {name}{hint}", fix)
    if not node.get("_partial_", False):
        for name, parameter in named.items():
            if parameter.default is parameter.empty and name not in given:
                yield ConfigError(f"{where}.{name}", f"{node['_target_']} needs it, and it is not given")
