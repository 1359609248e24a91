"""``ftlab diff``."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

HELP = "what two runs differ in, and from which step on it shows"


def declare(parser: ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="run folder")
    parser.add_argument("second", metavar="B", help="run folder")
    parser.add_argument("--json", action="store_true", help="for programs")


def run(arguments: Namespace) -> int:
    from ftlab.lab.diff import diff, open_run
    from ftlab.lab.diff_table import print_difference

    found = diff(open_run(arguments.first), open_run(arguments.second))
    if arguments.json:
        print(json.dumps(found.as_json()))
    else:
        print_difference(found)
    return 0 if found.same else 1
