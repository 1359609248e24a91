"""Values of ``dataset`` that nobody would read, because another value decides where rows come from.

One that a known set brings along is not meant for what the user puts in the set's place; one that is given together
with the value that decides, or after it, is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ftlab.config.compose import Composition
from ftlab.config.mixtures import SETS
from ftlab.errors import ConfigError
from ftlab.typed import as_typed, override

# What names a part of a set on the Hub: its value where it names none, and what does the same for other rows.
_OF_THE_HUB = {
    "split": ("train", ("max_samples", 1000)),
    "subset": (None, None),
    "revision": (None, None),
    "val_split": (None, ("val_fraction", 0.05)),
}


def unread(values: Mapping[str, Any], composition: Composition) -> Iterator[ConfigError]:
    """What is wrong with the values (dotted key to value) of the set, or of each set of a mixture."""
    for key in values:
        place, _, name = key.rpartition(".")
        if name == "source" and (place == "dataset" or place.startswith(f"{SETS}.")):
            found = [*_of_validation(place, values, composition), *_of_the_hub(place, values, composition)]
            yield from {problem.key: problem for problem in found}.values()


def _of_the_hub(place: str, values: Mapping[str, Any], composition: Composition) -> Iterator[ConfigError]:
    source = values[f"{place}.source"]
    # Only a file format takes files, and has to be given some.
    decider = f"{place}.data_files" if values.get(f"{place}.data_files") is not None else f"{place}.source"
    if decider == f"{place}.source" and source != "tiny":
        return
    for name, (default, instead) in _OF_THE_HUB.items():
        key = f"{place}.{name}"
        if _is_meant(key, default, decider, values, composition):
            problem = f"{as_typed(values[key])} would not be read: {place}.source={source} is no set on the Hub"
            fix = [override(key, default), *([override(f"{place}.{instead[0]}", instead[1])] if instead else ())]
            yield ConfigError(key, problem, " ".join(fix))


def _of_validation(place: str, values: Mapping[str, Any], composition: Composition) -> Iterator[ConfigError]:
    decider = f"{place}.val_fraction"
    if values.get(decider) is None:
        return
    for name in ("val_data_files", "val_split"):
        key = f"{place}.{name}"
        if _is_meant(key, None, decider, values, composition):
            share = f"{decider}={as_typed(values[decider])}"
            problem = f"{as_typed(values[key])} would not be read: {share} holds training rows out to validate with"
            yield ConfigError(key, problem, override(decider, None))


def _is_meant(key: str, default: Any, decider: str, values: Mapping[str, Any], composition: Composition) -> bool:
    is_given = values.get(key) not in (None, default)
    return is_given and composition.strength(key) >= composition.strength(decider)
