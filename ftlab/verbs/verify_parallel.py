"""``ftlab verify-parallel``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ftlab.verbs._types import declare_overrides, whole

HELP = "whether parallelism changes what a configuration computes"


def declare(parser: ArgumentParser) -> None:
    parser.add_argument("--steps", type=whole(1), default=5, metavar="N", help="optimizer steps to compare (default 5)")
    declare_overrides(parser)


def run(arguments: Namespace) -> int:
    from ftlab.lab.verify_parallel import print_deviations, verify_parallel

    deviations, tolerance = verify_parallel(arguments.overrides, arguments.steps, arguments.config_dir)
    print_deviations(deviations, tolerance, arguments.steps)
    return 0 if all(one.within(tolerance) for one in deviations) else 1
