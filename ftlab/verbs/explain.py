"""``ftlab explain``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ftlab.verbs._types import declare_overrides

HELP = "where a configuration value comes from"


def declare(parser: ArgumentParser) -> None:
    parser.add_argument("key", help="dotted key, e.g. optimizer.lr")
    declare_overrides(parser)


def run(arguments: Namespace) -> None:
    from ftlab.config.explain import explain

    print(explain(arguments.key, arguments.overrides, arguments.config_dir))
