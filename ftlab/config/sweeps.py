"""What of a command line is a sweep's own, and how a sweep is gone on with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from ftlab.config.compose import config_loader
from ftlab.config.rules import COUNT, Number, OneOf, Rule
from ftlab.errors import ConfigError
from ftlab.outputs.sweep import SweepFolder
from ftlab.typed import argument, in_shell, override

RESUME = "sweep.resume"
# Of the whole sweep: a job is the same job without them.
_OF_THE_SWEEP = (RESUME, "sweep.jobs_at_once", "paths.output_dir")


def of_the_jobs(overrides: Sequence[str]) -> list[str]:
    """``overrides`` without those that say how the sweep is run."""
    return [text for text in overrides if _key(text) not in _OF_THE_SWEEP]


def with_resumed_sweep(argv: Sequence[str]) -> list[str]:
    """The command line ``argv``, where it goes on with a sweep as the one that started it, in the same folder.

    Overrides beside ``sweep.resume`` take the place of those that the sweep was started with: the same again, or more
    of them, which adds jobs.

    Raises:
        ConfigError: there is no such sweep.
    """
    flags = get_args_parser().parse_args(list(argv))
    folder = next((value for text in flags.overrides if (value := _resumed(text)) is not None), None)
    if folder is None:
        return list(argv)
    sweep = SweepFolder.read(folder)
    typed, keys = list(flags.overrides), {_key(text) for text in flags.overrides}
    if all(_key(text).startswith("hydra") for text in of_the_jobs(typed)):
        if "command" not in sweep.about:
            problem = f"the record of {sweep.path} does not say what it was started with; say it again"
            raise ConfigError(RESUME, problem, f"-m optimizer.lr=1e-3,3e-3 {override(RESUME, str(sweep.path))}")
        typed = [*(text for text in of_the_jobs(sweep.about["command"]) if _key(text) not in keys), *typed]
    others = [argument for argument in argv if argument not in flags.overrides and argument not in ("-m", "--multirun")]
    return [*others, "-m", *typed, argument("paths.output_dir", str(sweep.path))]


def with_one_shown(argv: Sequence[str]) -> list[str]:
    """The command line ``argv``; where it asks to see a sweep (``-m --cfg``), with the values of its first job.

    Hydra itself refuses ``-m`` beside ``--cfg``.
    """
    flags = get_args_parser().parse_args(list(argv))
    if not (flags.cfg and flags.multirun):
        return list(argv)
    others = [argument for argument in argv if argument not in flags.overrides and argument not in ("-m", "--multirun")]
    parser = OverridesParser.create(config_loader(flags.config_dir))
    return [*others, *(_first(text, parser) for text in flags.overrides), "hydra.mode=MULTIRUN"]


def _first(text: str, parser: OverridesParser) -> str:
    """An override with the first of the values that it sweeps over, if it does."""
    try:
        [parsed] = parser.parse_overrides([text])  # which leaves the reader of options with it, for a glob
    except (HydraException, ValueError):  # told by who checks the command line
        return text
    if not parsed.is_sweep_override():
        return text
    if (problem := wrong_sweep(parsed, searched=True)) is not None:
        raise problem
    return extremes(parsed)[0]


@dataclass(frozen=True, kw_only=True)
class _Swept(Rule):
    """Keys, each with the values that it is to take."""

    def broken_by(self, value: Any) -> str | None:
        return None if isinstance(value, Mapping) else f"must hold keys with their values, got {value!r}"


_PARAMS = _Swept(optional=True, example={"optimizer.lr": "1e-3,3e-3"})
_AT_LEAST_0 = Number(whole=True, low=0)
_SETTINGS: dict[str, dict[str, Rule]] = {  # of the sweepers and launchers that are ours
    "hydra_plugins.ftlab_sweeps.sweeper.GridSweeper": {"params": _PARAMS},
    "hydra_plugins.ftlab_sweeps.search.OptunaSweeper": {
        "params": _PARAMS,
        "n_trials": COUNT,
        "sampler": OneOf(("tpe", "gp", "random")),
        "seed": Number(whole=True, low=0, below=2**32, optional=True),
        "pruner": OneOf(("median", "halving", "none")),
        "startup_trials": _AT_LEAST_0,
        "warmup_evaluations": _AT_LEAST_0,
    },
    "hydra_plugins.ftlab_sweeps.launcher.LocalLauncher": {"jobs_at_once": COUNT},
}


def is_ours(settings: Mapping[Any, Any]) -> bool:
    """Whether these are a sweeper's or launcher's of ours; others have schemas, by which Hydra composes them."""
    return str(settings.get("_target_")) in _SETTINGS


def wrong_settings(kind: str, settings: Mapping[str, Any]) -> Iterator[ConfigError]:
    """What is wrong with ``hydra.<kind>``, a sweeper or launcher that `is_ours`."""
    rules = _SETTINGS[settings["_target_"]]
    for name, value in settings.items():
        key = f"hydra.{kind}.{name}"
        if name in rules:
            yield from rules[name].check(key, value)
        elif name != "_target_":
            swept = f"{override(f'hydra.{kind}.params.{name}', value)}, where it is to be swept"
            fix = swept if "params" in rules else "sweep.jobs_at_once=2"
            yield ConfigError(key, f"no setting of this {kind}; it has {', '.join(rules)}", fix)


def wrong_sweep(swept: Override, *, searched: bool) -> ConfigError | None:
    """What is wrong with the values that a key is to take.

    Args:
        searched: whether a search picks them, which may do so from an interval.
    """
    value, key, typed = swept.value(), swept.get_key_element(), swept.get_value_string()
    problem: str | None
    if isinstance(value, IntervalSweep):
        if not searched:
            problem = f"{typed} is for a search, which picks the values; without one, name them"
            return ConfigError(key, problem, f"hydra/sweeper=optuna {in_shell(f'{key}={typed}')}")
        problem, better = _wrong_interval(value)
    elif isinstance(value, RangeSweep):
        problem, better = _wrong_range(value)
    else:
        counts = Counter(swept.sweep_string_iterator())
        twice = [text for text, count in counts.items() if count > 1]
        problem = f"names {', '.join(twice)} twice" if twice else None if counts else "matches no option"
        better = ",".join(counts) or "glob(*)"
    return ConfigError(key, f"{typed} {problem}", in_shell(f"{key}={better}")) if problem else None


def _wrong_interval(value: IntervalSweep) -> tuple[str | None, str]:
    """What is wrong with it, and one that was probably meant."""
    assert value.start is not None
    assert value.end is not None
    low, high = sorted((value.start, value.end))
    tags = ",".join(sorted(value.tags))
    better = f"tag({tags},interval({low},{high}))" if tags else f"interval({low},{high})"
    if not (math.isfinite(low) and math.isfinite(high)):
        return "has no ends", "interval(0,1)"
    if value.start > value.end:
        return "has its lower end last", better
    if "log" in value.tags and (int(low) if "int" in value.tags else low) <= 0:
        return "must lie above 0, for a logarithm to be taken", f"interval({low},{high})"
    return None, better


def _wrong_range(value: RangeSweep) -> tuple[str | None, str]:
    """What is wrong with it, and one that was probably meant."""
    assert value.start is not None
    assert value.stop is not None
    start, stop, step = value.start, value.stop, value.step
    if not all(map(math.isfinite, (start, stop, step))):
        return "has no ends", "range(0,5)"
    low, high = sorted((start, stop))
    better = f"range({low},{high}{f',{abs(step)}' if step not in (0, 1, -1) else ''})"
    return ("names no value" if step * (stop - start) <= 0 else None), better if low < high else str(low)


def extremes(swept: Override) -> list[str]:
    """``key=value`` for the values of a sweep that are worth checking: every one of a few, the ends of many."""
    value, key = swept.value(), swept.get_key_element()
    if isinstance(value, IntervalSweep):
        return [f"{key}={end:g}" for end in (value.start, value.end) if end is not None]
    texts = [f"{key}={text}" for text in swept.sweep_string_iterator()]
    return texts if swept.is_choice_sweep() else [texts[0], texts[-1]]


def _resumed(text: str) -> str | None:
    """The folder of the sweep that an override asks to go on with; who checks the command line tells of any other."""
    try:
        given = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError):
        return None
    folder = given.value() if given.key_or_group == RESUME else None
    return folder if isinstance(folder, str) and folder.strip() else None


def _key(text: str) -> str:
    try:
        return OverridesParser.create().parse_override(text).key_or_group
    except (HydraException, ValueError):
        return text.partition("=")[0].lstrip("+~")
