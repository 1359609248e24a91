"""The configuration that a run's folder or a checkpoint holds, which somebody else may have written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ftlab.config.layers import leaves
from ftlab.config.rules import rule_for
from ftlab.config.targets import forbidden, in_todays_names, misfits, unnamed
from ftlab.errors import ConfigError, ConfigErrors

_SCALARS = ("run_name", "seed", "seq_len", "device")


def stored_config(config: Any, where: object, to_build: Sequence[str] = ()) -> dict[str, Any]:
    """``config`` in today's names, once it is known to be one that ftlab could have composed.

    Nothing of it is resolved: what looks like an interpolation stays text. Nothing of it is called, and what could
    be is in the allowlist.

    Args:
        where: it was found, for errors.
        to_build: the groups that will be built as they are: their arguments must fit.

    Raises:
        ConfigErrors: with all that is wrong.
    """
    try:
        config = in_todays_names(config)
    except ValueError as error:
        raise ConfigErrors([ConfigError("RUN", f"the configuration in {where} is {error}")]) from None
    problems = [_placed(problem, where) for problem in _faults(config)]
    if not problems:
        problems = [_placed(problem, where) for problem in misfits({group: config[group] for group in to_build})]
    if problems:
        raise ConfigErrors(problems)
    found: dict[str, Any] = config
    return found


def _faults(config: Any) -> Iterator[ConfigError]:
    if not isinstance(config, dict):
        yield ConfigError("RUN", "there is no configuration")
        return
    yield from unnamed(config)
    yield from (ConfigError(key, "is missing") for key in _SCALARS if key not in config)
    yield from forbidden(config)
    for key, value in leaves(config):
        if (rule := rule_for(key, None)) is not None:
            yield from rule.check(key, value)


def _placed(problem: ConfigError, where: object) -> ConfigError:
    return ConfigError(problem.key, f"{problem.problem} (in {where})")
