"""``ftlab explain``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ftlab.verbs._types import folder

HELP = "where a configuration value comes from"


def declare(parser: ArgumentParser) -> None:
    parser.add_argument("key", help="dotted key, e.g. optimizer.lr")
    parser.add_argument("--config-dir", type=folder, metavar="FOLDER", help="with options of yours, as for train.py")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")


def run(arguments: Namespace) -> None:
    from ftlab.config.explain import explain

    print(explain(arguments.key, arguments.overrides, arguments.config_dir))
