"""What of a command line is a sweep's own, and how a sweep is gone on with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
)
from hydra.errors import HydraException

from ftlab.config.rules import COUNT, Number, OneOf, Rule
from ftlab.errors import ConfigError
from ftlab.outputs.sweep import SweepFolder
from ftlab.typed import argument, override

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
    return [*others, *(_first(text) for text in flags.overrides), "hydra.mode=MULTIRUN"]


def _first(text: str) -> str:
    """An override with the first of the values that it sweeps over, if it does."""
    try:
        parsed = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError):  # told by who checks the command line
        return text
    return extremes(parsed)[0] if parsed.is_sweep_override() else text


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


def extremes(swept: Override) -> list[str]:
    """``key=value`` for the values of a sweep that are worth checking: every one of a few, the ends of many."""
    value, key = swept.value(), swept.get_key_element()
    if isinstance(value, IntervalSweep):
        return [f"{key}={end:g}" for end in (value.start, value.end) if end is not None]
    texts = [f"{key}={text}" for text in swept.sweep_string_iterator()]
    assert isinstance(value, (ChoiceSweep, RangeSweep))
    return texts if isinstance(value, ChoiceSweep) else [texts[0], texts[-1]]


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
