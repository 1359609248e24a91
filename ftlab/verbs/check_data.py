"""``ftlab check-data``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ftlab.verbs._types import folder

HELP = "what is wrong with the data, and what of it is trained"


def declare(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("outputs/check-data"), metavar="FOLDER")
    parser.add_argument("--config-dir", type=folder, metavar="FOLDER", help="with options of yours, as for train.py")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")


def run(arguments: Namespace) -> int:
    from ftlab.lab.check_data import check_data

    return check_data(arguments.overrides, arguments.out, arguments.config_dir)
