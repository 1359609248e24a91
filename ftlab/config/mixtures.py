"""The sets of a mixture, chosen on the command line: ``dataset.sets=[a,b]``, with weights ``dataset.sets={a:3,b:1}``.

Hydra can place options anywhere (``+dataset@dataset.sets.a=a``); this says it for the user, with a weight for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from ftlab.errors import ConfigError, ConfigErrors

SETS, WEIGHTS = "dataset.sets", "dataset.weights"
_OPTION = "mixture"


def with_sets(overrides: Sequence[str], conf: Path) -> list[str]:
    """``overrides`` with a choice of sets taken apart; all others as they are.

    Args:
        conf: the folder of the options, whose mixture has sets of its own that these replace.

    Raises:
        ConfigErrors: for a choice that is none.
    """
    chosen = {text: weights for text in overrides if (weights := _weights_in(text)) is not None}
    if not chosen:
        return list(overrides)
    others = [text for text in overrides if text not in chosen]
    if len(chosen) > 1:
        raise ConfigErrors([ConfigError(SETS, f"is chosen twice: {' and '.join(chosen)}", next(iter(chosen)))])
    [(text, weights)] = chosen.items()
    options = [other for other in others if other.startswith("dataset=")]
    if any(option != f"dataset={_OPTION}" for option in options):
        raise ConfigErrors(
            [ConfigError(SETS, f"{text} goes with dataset={_OPTION}, not {options[0]}", f"dataset={_OPTION} {text}")]
        )
    if not weights or _OPTION in weights:
        raise ConfigErrors([ConfigError(SETS, f"{text} names no sets to mix", f"{SETS}=[alpaca,gsm8k]")])
    pattern = yaml.safe_load((conf / "dataset" / f"{_OPTION}.yaml").read_text(encoding="utf-8"))
    own = list(pattern["weights"])
    return [
        f"dataset={_OPTION}",
        *(f"~dataset@{SETS}.{name}" for name in own),
        *(f"+dataset@{SETS}.{name}={name}" for name in weights),
        *(f"~{WEIGHTS}.{name}" for name in own),
        *(f"+{WEIGHTS}.{name}={weight}" for name, weight in weights.items()),
        *(other for other in others if other not in options),
    ]


def _weights_in(text: str) -> Mapping[str, float] | None:
    """Set to weight, where ``text`` chooses sets; None where it is any other override."""
    if not text.startswith(f"{SETS}="):
        return None
    try:
        value = OverridesParser.create().parse_override(text).value()
    except HydraException:
        return None  # told where all are read
    if isinstance(value, list):
        if twice := sorted({str(name) for name in value if value.count(name) > 1}):
            raise ConfigErrors(
                [ConfigError(SETS, f"{text} names {', '.join(twice)} twice", f"{SETS}={{{twice[0]}:2}}")]
            )
        return {str(name): 1.0 for name in value}
    if isinstance(value, dict) and not any(isinstance(one, dict) for one in value.values()):
        return {str(name): weight for name, weight in value.items()}
    return None
