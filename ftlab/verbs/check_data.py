"""``ftlab check-data``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ftlab.verbs._types import declare_overrides

HELP = "what is wrong with the data, and what of it is trained"


def declare(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("outputs/check-data"), metavar="FOLDER")
    declare_overrides(parser)


def run(arguments: Namespace) -> int:
    from ftlab.lab.check_data import check_data

    return check_data(arguments.overrides, arguments.out, arguments.config_dir)
