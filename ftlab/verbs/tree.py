"""``ftlab tree``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

HELP = "which run came from which: forks and resumes"


def declare(parser: ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="FOLDER|FILTER", help="as for ls")


def run(arguments: Namespace) -> None:
    from ftlab.lab.listing import print_tree, select

    print_tree(select(arguments.words))
