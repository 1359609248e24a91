"""What a command line says, taken apart: options chosen, values set, Hydra's own settings, and the unreadable."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from ftlab.config.mixtures import SETS, WEIGHTS
from ftlab.errors import ConfigError
from ftlab.typed import in_shell, override

_NULL = re.compile(r"(\w+)=(?:[\w,]*,)?null(?:,[\w,]*)?")  # null, or one of several options
Options = Mapping[str, Sequence[str]]


@dataclass
class CommandLine:
    """Overrides by kind. Those with a problem are in no list but ``problems``; a sweep's are in ``sweeps``.

    ``choices`` are by group, or for a mixture's sets by group and package. ``deleted`` are weights of a mixture's sets.
    """

    choices: dict[str, Override] = field(default_factory=dict)
    values: list[Override] = field(default_factory=list)
    deleted: list[Override] = field(default_factory=list)
    hydra: list[Override] = field(default_factory=list)
    sweeps: list[Override] = field(default_factory=list)
    problems: list[ConfigError] = field(default_factory=list)


def read_overrides(overrides: Sequence[str], options: Options) -> CommandLine:
    """Parse ``overrides``; ``options`` are the groups with the options of each."""
    line = CommandLine()
    parser = OverridesParser.create()
    for text in overrides:
        if not text.isprintable() and re.search(r"[\ud800-\udfff]", text):
            key, _, value = text.partition("=")
            line.problems.append(ConfigError(key, f"holds bytes that are not UTF-8: {value!a}"))
            continue
        try:
            given = parser.parse_override(text)
        except (HydraException, ValueError) as error:  # ValueError: a number of more than 4300 digits
            line.problems.append(_unreadable(text, str(error)))
            continue
        key = given.key_or_group
        if key in options and (given.package or "").startswith(f"{SETS}."):
            _place(given, options[key], line)
        elif given.is_delete() and key.startswith(f"{WEIGHTS}."):
            line.deleted.append(given)
        elif given.is_delete():
            line.problems.append(ConfigError(key, f"{text} would take it out of the configuration; set it instead"))
        elif given.is_sweep_override():
            line.sweeps.append(given)
        elif key == "hydra":
            problem = f"{text}: it holds Hydra's own settings; set one of them"
            line.problems.append(ConfigError(key, problem, "hydra.run.dir=/a/folder/of/yours"))
        elif key.startswith("hydra."):
            line.hydra.append(given)
        elif key in options and not isinstance(given.value(), dict):
            _choose(given, options[key], line)
        else:
            line.values.append(given)
    return line


def with_no_option(overrides: Sequence[str], conf: Path, primary: str) -> list[str]:
    """``overrides`` with ``group=null`` as Hydra has it, ``group=[]``, where the primary config itself says null.

    Of a sweep too: ``experiment=null,mine``.
    """
    if not any(map(_NULL.fullmatch, overrides)):
        return list(overrides)
    defaults = yaml.safe_load((conf / f"{primary}.yaml").read_text(encoding="utf-8"))["defaults"]
    entries = [entry for entry in defaults if isinstance(entry, dict)]
    groups = {group for entry in entries for group, option in entry.items() if option is None}
    return [
        re.sub(r"\bnull\b", "[]", text) if (found := _NULL.fullmatch(text)) and found[1] in groups else text
        for text in overrides
    ]


def given_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Key and value of each override that gives one."""
    parser, values = OverridesParser.create(), {}
    for text in overrides:
        with suppress(HydraException, ValueError):
            given = parser.parse_override(text)
            if not given.is_delete() and not given.is_sweep_override():
                values[given.key_or_group] = given.value()
    return values


def several_values(given: Override) -> ConfigError:
    """The error for an override that sweeps where one run was asked for."""
    problem = f"{text_of(given)} names several values: -m makes a run of each, [...] makes a list of them"
    return ConfigError(given.key_or_group, problem, f"-m {in_shell(text_of(given))}")


def text_of(override: Override) -> str:
    """The override as it was typed."""
    assert override.input_line is not None
    return override.input_line


def _unreadable(text: str, told: str) -> ConfigError:
    if "=" not in text:
        return ConfigError(text, "is not an override; those read key=value")
    key, _, value = text.partition("=")
    if "[" in key:
        plain = re.sub(r"\[(\w+)\]", r".\1", key)
        return ConfigError(key, "is not how an element of a list is named", f"{plain}={value}")
    return ConfigError(key, f"cannot be read: {told.splitlines()[0]}", f"{override(key, value)}   (as text)")


def _place(given: Override, options: Sequence[str], line: CommandLine) -> None:
    """Add, change or take away one of a mixture's sets."""
    name = str(given.value())
    if given.is_delete() or name in options:
        line.choices[text_of(given).partition("=")[0]] = given
    else:
        nearest = (difflib.get_close_matches(name, options, n=1, cutoff=0.3) or list(options[:1]))[0]
        problem = f"has no option {name!r}; choices: {', '.join(options)}"
        line.problems.append(ConfigError(given.key_or_group, problem, f"{SETS}=[{nearest}]"))


def _choose(given: Override, options: Sequence[str], line: CommandLine) -> None:
    """Add the choice of an option that exists, once per group."""
    group, text, value = given.key_or_group, text_of(given), given.value()
    names: list[Any] = value if isinstance(value, list) else ["null" if value is None else value]
    unknown = [str(name) for name in names if str(name) not in options or value is None]
    before = line.choices.get(group)
    if given.is_add() or given.is_force_add() or given.package:
        problem = f"{text} would place a second {group} in the configuration"
        line.problems.append(ConfigError(group, problem, f"{group}={names[0]}"))
    elif unknown:
        nearest = difflib.get_close_matches(unknown[0], options, n=1, cutoff=0.3) or list(options[:1])
        problem = f"has no option {unknown[0]!r}; choices: {', '.join(options)}"
        line.problems.append(ConfigError(group, problem, f"{group}={nearest[0]}" if nearest else None))
    elif before is not None and before.value() != value:
        problem = f"two options are given: {text_of(before)} and {text}"
        line.problems.append(ConfigError(group, problem, text))
    else:
        line.choices[group] = given
