"""``ftlab verify-resume``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ftlab.verbs._types import declare_overrides, whole

HELP = "whether a killed and resumed run ends as one that was not"


def declare(parser: ArgumentParser) -> None:
    # A checkpoint, and a step after it to be killed in.
    parser.add_argument("--steps", type=whole(2), default=10, metavar="N", help="optimizer steps to train (default 10)")
    declare_overrides(parser)


def run(arguments: Namespace) -> int:
    from ftlab.lab.verify_resume import print_compared, verify_resume

    compared, folder = verify_resume(arguments.overrides, arguments.steps, arguments.config_dir)
    print_compared(compared, folder, arguments.steps)
    return 0 if all(one.same for one in compared) else 1
