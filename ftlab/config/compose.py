"""From a command line to one configuration, with everything that is wrong on the way collected, not raised.

Hydra composes; this module asks it in two steps (options first, values second), because Hydra stops at the
first mistake and knows nothing of keys that ``+`` or a recipe smuggles in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ftlab.config import resolvers
from ftlab.config.keys import Keys
from ftlab.config.layers import Layer, Setting, leaves, read_layers
from ftlab.config.mixtures import with_sets
from ftlab.config.overrides import CommandLine, read_overrides, several_values, text_of, with_no_option
from ftlab.errors import ConfigError, ConfigErrors

CONF = Path(__file__).resolve().parents[2] / "conf"
PRIMARY = "train"
VERSION_BASE = "1.3"


@dataclass(frozen=True)
class Composition:
    """One composed configuration, not yet checked.

    Attributes:
        cfg: Hydra's result, with the ``hydra`` node, interpolations unresolved.
        layers: the files it is made of, weakest first.
        given: the command line; its ``values`` hold only those that ``cfg`` took.
        problems: what was wrong with the command line or with a recipe's keys.
    """

    cfg: DictConfig
    layers: list[Layer]
    given: CommandLine
    problems: list[ConfigError]

    def history(self, key: str) -> list[Setting]:
        """Everyone who set ``key``, weakest first; the last one won."""
        found = [layer.settings[key] for layer in self.layers if key in layer.settings]
        typed = [value for value in self.given.values if _touches(value, key)]
        return found + [Setting(value.value(), f"command line: {text_of(value)}") for value in typed]

    def strength(self, key: str) -> int:
        """The number of the layer that had the last word on ``key``; the command line is above them all."""
        if any(_touches(value, key) for value in self.given.values):
            return len(self.layers)
        return max((number for number, layer in enumerate(self.layers) if key in layer.settings), default=-1)

    def default(self, key: str) -> Any:
        """The raw value of ``key`` in the file that defines it; None too when nobody defines it."""
        values = [layer.settings[key].value for layer in self.layers if layer.defines and key in layer.settings]
        return values[-1] if values else None


def compose(
    overrides: Sequence[str],
    *,
    primary: str = PRIMARY,
    extra_dir: str | Path | None = None,
    sweep: bool = False,
) -> Composition:
    """Compose ``conf/<primary>.yaml`` with ``overrides``.

    Args:
        extra_dir: a further folder to search for options, Hydra's ``--config-dir``.
        sweep: whether overrides may name several values. They are left out either way.

    Raises:
        ConfigErrors: when nothing can be composed, for example because a file is not valid YAML.
    """
    prepare()
    loader = config_loader(extra_dir)
    given = read_overrides(in_hydras_terms(overrides), _options(loader))
    problems = list(given.problems) + ([] if sweep else [several_values(swept) for swept in given.sweeps])
    with hydra_errors(problems):
        choices = [text_of(choice) for choice in given.choices.values()]
        with _reading_files():
            defaults = loader.compute_defaults_list(primary, choices, RunMode.RUN).defaults
            layers = read_layers(loader, defaults, primary)
        keys = Keys(layers, option_files=_option_files(loader))
        problems += [p for layer in layers if not layer.defines for p in keys.check_layer(layer)]
        problems += keys.check_pins([layer for layer in layers if layer.name.startswith("experiment/")])
        wrong = {id(value): list(keys.check_override(value)) for value in given.values}
        problems += [p for found in wrong.values() for p in found]
        given.values = [value for value in given.values if not wrong[id(value)]]
        settings = [text_of(value) for value in given.hydra + given.deleted + given.values]
        with _reading_files():
            cfg = loader.load_configuration(primary, choices + settings, RunMode.RUN)
    return Composition(cfg, layers, given, problems)


def in_hydras_terms(overrides: Sequence[str]) -> list[str]:
    """``overrides`` with what is ftlab's own way to say it as Hydra has it: a mixture's sets, no option of a group."""
    return with_sets(with_no_option(overrides, CONF, PRIMARY), CONF)


def _touches(given: Override, key: str) -> bool:
    """Whether an override sets ``key``, or an element of it, or ``key`` as part of a mapping."""
    name, value = given.key_or_group, given.value()
    if isinstance(value, dict):
        return any(key == leaf for leaf, _ in leaves(value, f"{name}.")) or name == key
    return name == key or name.startswith(f"{key}.")


def prepare() -> None:
    """Set Hydra's version base and register all resolvers; `compose` and ``train.py`` need both."""
    version.setbase(VERSION_BASE)
    setup_globals()
    resolvers.register()


def config_loader(extra_dir: str | Path | None) -> ConfigLoaderImpl:
    """Hydra's reader of ``conf/`` and, before it, of ``extra_dir``."""
    if not CONF.is_dir():
        raise ConfigErrors([ConfigError(str(CONF), "is missing: ftlab runs from its project", "pip install -e .")])
    search_path = create_config_search_path(str(CONF))
    if extra_dir is not None:
        folder = Path(extra_dir).absolute()
        search_path.prepend("command-line", f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(search_path)


def _options(loader: ConfigLoaderImpl) -> dict[str, list[str]]:
    """The options of every group, Hydra's own groups too."""
    groups = [group for group in loader.repository.get_group_options("", ObjectType.GROUP) if group != "hydra"]
    groups += [f"hydra/{group}" for group in loader.repository.get_group_options("hydra", ObjectType.GROUP)]
    # Not loader.get_group_options: it reads the primary config anew for every group, a quarter of a second in all.
    return {group: sorted(loader.repository.get_group_options(group, ObjectType.CONFIG)) for group in groups}


def _option_files(loader: ConfigLoaderImpl) -> dict[str, list[Path]]:
    roots = [Path(source.path) for source in loader.get_sources() if source.scheme() == "file"]
    files: dict[str, list[Path]] = {}
    for file in (file for root in roots for file in sorted(root.glob("*/*.yaml"))):
        files.setdefault(file.parent.name, []).append(file)
    return files


@contextmanager
def hydra_globals(cfg: DictConfig) -> Iterator[None]:
    """Let ``${hydra:...}`` in ``cfg`` resolve, outside of a Hydra job too."""
    instance = HydraConfig.instance()
    before = instance.cfg
    instance.set_config(cfg)
    try:
        yield
    finally:
        instance.cfg = before


@contextmanager
def hydra_errors(known: Sequence[ConfigError] = ()) -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise into `ConfigErrors`, after the ``known`` problems."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{_shown(mark.name)}:{mark.line + 1}:{mark.column + 1}" if mark else "conf"
        raise ConfigErrors([*known, ConfigError(where, f"not valid YAML: {error.problem}")]) from error
    except (HydraException, OmegaConfBaseException) as error:
        told = str(error) or str(error.__cause__)  # Hydra wraps OmegaConf's exception in one without a text
        key = re.search(r"full_key: (\S+)|override '?([\w.]+)", told)
        problem = next((line.strip() for line in told.splitlines() if line.strip()), repr(error))
        if problem.startswith("Error merging override") and error.__cause__ is not None:
            problem += f": {next(iter(str(error.__cause__).splitlines()), '')}"
        name = next(filter(None, key.groups())) if key else "configuration"
        raise ConfigErrors([*known, ConfigError(name, problem)]) from error


@contextmanager
def _reading_files() -> Iterator[None]:
    """Where Hydra's readers of files raise Python's own exceptions for what is wrong in a file."""
    try:
        yield
    except (HydraException, OmegaConfBaseException):
        raise  # some of them are ValueErrors too
    except (ValueError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        told = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigErrors([ConfigError("conf", f"the file of an option cannot be read: {told}")]) from error


def _shown(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(CONF.parent)) if path.is_relative_to(CONF.parent) else file
