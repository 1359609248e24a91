"""Where a value comes from: the file and line or the override that set it, and what that shadowed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlab.config.compose import Composition, compose, hydra_globals
from ftlab.config.keys import Keys
from ftlab.config.layers import Setting, leaves
from ftlab.config.resolve import resolve
from ftlab.errors import ConfigError, ConfigErrors
from ftlab.outputs.secrets import mask_secrets
from ftlab.typed import as_typed


def explain(key: str, overrides: Sequence[str] = (), extra_dir: Path | None = None) -> str:
    """The value of ``key`` and its history, as text; for a group, a line for each of its keys.

    Args:
        extra_dir: a further folder to search for options.

    Raises:
        ConfigErrors: when ``overrides`` do not compose.
        ConfigError: when ``key`` does not exist.
    """
    composition = compose(overrides, extra_dir=extra_dir)
    if composition.problems:
        raise ConfigErrors(composition.problems)
    with hydra_globals(composition.cfg):
        config, _ = resolve(composition.cfg)  # a broken interpolation is shown as what it says
    values = dict(leaves(config))
    inside = [name for name in values if name.startswith(f"{key}.")]
    if key in values:
        text = _explain_one(key, values, composition)
    elif inside:
        text = "\n".join(_explain_line(name, values, composition) for name in inside)
    else:
        unknown = Keys(composition.layers, {}).unknown(key, None)
        raise ConfigError(key, unknown.problem)  # without its advice to set another key
    return str(mask_secrets(text))


def _explain_one(key: str, values: dict[str, Any], composition: Composition) -> str:
    *shadowed, winner = composition.history(key)
    lines = [f"{key} = {_text(values.get(key))}", f"  set by   {_shown(winner)}"]
    lines += [f"  shadows  {_shown(setting)}" for setting in reversed(shadowed)]
    return "\n".join(lines)


def _explain_line(key: str, values: dict[str, Any], composition: Composition) -> str:
    return f"{key + ' = ' + _text(values[key]):<56}  {composition.history(key)[-1].where}"


def _shown(setting: Setting) -> str:
    typed = setting.where.startswith("command line")  # it shows its value already
    return setting.where if typed else f"{setting.where}   {_text(setting.value)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else as_typed(value)
