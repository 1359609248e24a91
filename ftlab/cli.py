"""``python -m ftlab VERB`` or ``ftlab VERB``: what there is beside training."""

from __future__ import annotations

import argparse
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
    arguments = _parser().parse_args(argv)
    return exit_code_of(lambda: arguments.run_verb(arguments) or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ftlab", description="Fine-tuning as experiments: what there is beside train.py."
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        its_own = verbs.add_parser(name, help=verb.HELP)
        verb.declare(its_own)
        its_own.set_defaults(run_verb=verb.run)
    return parser
