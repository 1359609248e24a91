"""``ftlab verify-parallel``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ftlab.verbs._types import whole

HELP = "whether parallelism changes what a configuration computes"


def declare(parser: ArgumentParser) -> None:
    parser.add_argument("--steps", type=whole(1), default=5, metavar="N", help="optimizer steps to compare (default 5)")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")


def run(arguments: Namespace) -> int:
    from ftlab.lab.verify_parallel import print_deviations, verify_parallel

    deviations, tolerance = verify_parallel(arguments.overrides, arguments.steps)
    print_deviations(deviations, tolerance, arguments.steps)
    return 0 if all(one.within(tolerance) for one in deviations) else 1
