"""Which keys a composition has, and what someone meant who wrote another."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from ftlab.config.layers import Layer, leaves
from ftlab.config.mixtures import SETS, WEIGHTS
from ftlab.errors import ConfigError
from ftlab.typed import in_shell, override


class Keys:
    """The keys that the chosen options and the primary config define.

    Args:
        layers: the composition's files; those that ``defines`` make the keys.
        option_files: the files of every group's options, chosen or not. Only for advice.
    """

    def __init__(self, layers: Iterable[Layer], option_files: Mapping[str, Sequence[Path]]):
        self._option_files = option_files
        layers = list(layers)
        self._chosen = {group: option for group, slash, option in (x.name.partition("/") for x in layers) if slash}
        self.defaults = {key: s.value for layer in layers if layer.defines for key, s in layer.settings.items()}
        self.parents = {key[:i] for key in self.defaults for i, char in enumerate(key) if char == "."}

    def check_layer(self, layer: Layer) -> Iterator[ConfigError]:
        """The keys that a recipe, sweep, local or debug file changes must exist."""
        unknown = {key: setting for key, setting in layer.settings.items() if not self.exists(key)}
        if unknown and layer.package:  # one that changes keys of all groups, were its first line as it should be
            first = next(iter(unknown.values()))
            problem = f"puts all its keys below {layer.package}, and there is no {next(iter(unknown))} ({first.where})"
            yield ConfigError(layer.name, problem, "# @package _global_   (as the file's first line)")
            return
        for key, setting in unknown.items():
            yield self.unknown(key, setting.value, setting.where)

    def check_pins(self, recipes: Sequence[Layer]) -> Iterator[ConfigError]:
        """A recipe that sets a value of a group says which of the group's options the value was found with.

        Else a later default, or another recipe's choice, would take the learning rate of one optimizer over to another.
        """
        picked = frozenset().union(*(recipe.picks for recipe in recipes))
        for key, setting in ((key, setting) for recipe in recipes for key, setting in recipe.settings.items()):
            group, _, rest = key.partition(".")
            options = [file.stem for file in self._option_files.get(group, ())]
            # Of several options (logger), each has a key of its own, which says what is meant.
            if len(options) > 1 and group not in picked and rest.partition(".")[0] not in options:
                problem = f"is set, but which {group} it is for is not said ({setting.where})"
                option = self._chosen.get(group, options[0])
                yield ConfigError(key, problem, f"in its defaults:  - override /{group}: {option}")

    def check_override(self, given: Override) -> Iterator[ConfigError]:
        """So must the keys that the command line changes, with ``+`` and ``++`` too."""
        key, value, text = given.key_or_group, given.value(), given.input_line or ""
        if given.package is not None:
            yield ConfigError(f"{key}@{given.package}", "is not a group; only groups go with @")
        elif isinstance(value, Mapping) and value and key not in self.defaults:
            for leaf, leaf_value in leaves(value, f"{key}."):
                if not self.exists(leaf):
                    yield self.unknown(leaf, leaf_value)
        elif not self.exists(key):
            yield self.unknown(key, value)
        elif given.is_add() and key in self.defaults:
            yield ConfigError(key, f"{text} adds a key that exists already", in_shell(text.removeprefix("+")))

    def exists(self, key: str) -> bool:
        """Whether ``key`` holds a value, is an element of a list that does, or is the weight of a mixture's set."""
        parent, _, last = key.rpartition(".")
        weighs = parent == WEIGHTS and f"{SETS}.{last}.source" in self.defaults
        return key in self.defaults or weighs or (last.isdigit() and isinstance(self.defaults.get(parent), list))

    def unknown(self, key: str, value: Any, where: str | None = None) -> ConfigError:
        """The error for a key that does not `exists`, with the key that was probably meant."""
        origin = f" ({where})" if where else ""
        if key in self.parents:
            children = [known for known in self.defaults if known.startswith(f"{key}.")]
            names = ", ".join(name.removeprefix(f"{key}.") for name in children)
            return ConfigError(key, f"is no value{origin}, it holds {names}")
        group, _, rest = key.partition(".")
        having = [file.stem for file in self._option_files.get(group, ()) if rest in _top_level_keys(file)]
        if having:
            problem = f"unknown key{origin}: only {group}={'|'.join(having)} has it"
            return ConfigError(key, problem, f"{group}={having[0]}")
        neighbours = {
            known.removeprefix(f"{group}."): known for known in self.defaults if known.startswith(f"{group}.")
        }
        if (nearest := self._nearest(key, neighbours)) is not None:
            return ConfigError(key, f"unknown key{origin}; did you mean {nearest}?", override(nearest, value))
        names = ", ".join(name for name in neighbours if not name.startswith("_"))
        problem = f"unknown key{origin}" + (f"; {group} has {names}" if names else "")
        return ConfigError(key, problem, None if names else "python train.py --cfg job   (shows every key)")

    def _nearest(self, key: str, neighbours: Mapping[str, str]) -> str | None:
        """A key of the same name elsewhere, else a similar one in the same group, else a similar one anywhere."""
        name = key.rpartition(".")[2]
        if same_name := [known for known in self.defaults if known.rpartition(".")[2] == name]:
            return difflib.get_close_matches(key, same_name, n=1, cutoff=0.0)[0]
        if neighbours:
            nearest = difflib.get_close_matches(key.partition(".")[2], neighbours, n=1)
            return neighbours[nearest[0]] if nearest else None
        everything = [*self.defaults, *self._option_files]
        return next(iter(difflib.get_close_matches(key, everything, n=1)), None)


def _top_level_keys(file: Path) -> set[str]:
    content = OmegaConf.load(file)
    return {str(key) for key in content}
