"""``ftlab ls``."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

HELP = "which runs there are"


def declare(parser: ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="FOLDER|FILTER", help="e.g. outputs status=failed 'val/loss<2'")
    parser.add_argument("--sort", default="started", metavar="KEY", help="fact, setting or metric (default started)")
    parser.add_argument("--columns", default="", metavar="K,K", help="further ones: settings or metrics")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(arguments: Namespace) -> None:
    from ftlab.lab.listing import as_rows, print_runs, select

    runs = select(arguments.words, arguments.sort)
    if arguments.json:
        print(json.dumps(as_rows(runs)))
    else:
        print_runs(runs, [key for key in arguments.columns.split(",") if key])
