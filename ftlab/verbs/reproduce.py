"""``ftlab reproduce``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

HELP = "a completed run once more: bitwise the same, or what has changed?"


def declare(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="run folder, e.g. outputs/latest")


def run(arguments: Namespace) -> int:
    from ftlab.lab.diff import open_run
    from ftlab.lab.reproduce import print_reproduced, reproduce

    run = open_run(arguments.run)
    found = reproduce(run)
    print_reproduced(run, found)
    return 0 if found.verdict in ("bitwise", "same as logged", "within tolerance") else 1
