"""What the verbs' command lines hold: arguments of several, and types that refuse, in words, what cannot be used."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path


def declare_config_dir(parser: ArgumentParser) -> None:
    """``--config-dir``."""
    parser.add_argument("--config-dir", type=folder, metavar="FOLDER", help="with options of yours, as for train.py")


def declare_overrides(parser: ArgumentParser) -> None:
    """What describes a run."""
    declare_config_dir(parser)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")


def whole(least: int) -> Callable[[str], int]:
    """The type of whole numbers from ``least`` on."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if number < least:
            raise ArgumentTypeError(f"must be at least {least}, got {text}")
        if number >= 2**63:
            raise ArgumentTypeError(f"must be below 2**63, got {text}")
        return number

    return read


def positive(text: str) -> float:
    """A number above 0."""
    if (number := _finite(text)) <= 0:
        raise ArgumentTypeError(f"must be above 0, got {text}")
    return number


def not_negative(text: str) -> float:
    """A number of at least 0."""
    if (number := _finite(text)) < 0:
        raise ArgumentTypeError(f"must be at least 0, got {text}")
    return number


def share(text: str) -> float:
    """A number above 0, and at most 1."""
    if not 0 < (number := _finite(text)) <= 1:
        raise ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return number


def folder(text: str) -> Path:
    """A folder that there is."""
    if not (path := Path(text).expanduser()).is_dir():
        raise ArgumentTypeError(f"there is no folder {text}")
    return path


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ArgumentTypeError(f"must be a number, got {text!r}")
    return number
