"""``python -m ftlab VERB`` or ``ftlab VERB``: what there is beside training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from ftlab import ctrl_c
from ftlab.exit_codes import exit_code_of
from ftlab.verbs import (
    check_data,
    diff,
    evaluate,
    explain,
    export,
    from_torchtune,
    generate,
    ls,
    plan,
    replay,
    report,
    reproduce,
    tree,
    verify_parallel,
    verify_resume,
)


class Verb(Protocol):
    """What a module of `ftlab.verbs` has."""

    HELP: str

    def declare(self, parser: argparse.ArgumentParser) -> None:
        """Say which arguments it takes."""
        ...

    def run(self, arguments: argparse.Namespace) -> int | None:
        """Do it; the exit code, if that is not 0."""
        ...


VERBS: dict[str, Verb] = {
    "explain": explain,
    "plan": plan,
    "check-data": check_data,
    "from-torchtune": from_torchtune,
    "verify-parallel": verify_parallel,
    "verify-resume": verify_resume,
    "ls": ls,
    "tree": tree,
    "diff": diff,
    "report": report,
    "replay": replay,
    "reproduce": reproduce,
    "evaluate": evaluate,
    "generate": generate,
    "export": export,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    ctrl_c.remember()
    arguments = parse(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: arguments.run_verb(arguments) or 0)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of the verb that ``argv`` begins with, and as ``run_verb`` what runs it."""
    parser = argparse.ArgumentParser(
        prog="ftlab", description="Fine-tuning as experiments: what there is beside train.py."
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    of_verbs = {}
    for name, verb in VERBS.items():
        of_verbs[name] = verbs.add_parser(name, help=verb.HELP)
        verb.declare(of_verbs[name])
        of_verbs[name].set_defaults(run_verb=verb.run)
    if argv and argv[0] in of_verbs and "--" not in argv:
        # Words and options in any order: which argparse has for a parser without verbs only, and without a "--".
        return of_verbs[argv[0]].parse_intermixed_args(argv[1:])
    return parser.parse_args(argv)
