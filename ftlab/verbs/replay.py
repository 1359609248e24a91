"""``ftlab replay``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ftlab.verbs._types import whole

HELP = "the batch of one step of a run, built again and compared"


def declare(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder, e.g. outputs/latest")
    parser.add_argument("--step", type=whole(1), required=True, metavar="N", help="optimizer step, counted from 1")
    parser.add_argument("--show", type=whole(0), default=3, metavar="N", help="samples to show whole (default 3)")


def run(arguments: Namespace) -> int:
    from ftlab.lab.replay import print_replayed, replay

    batch = replay(arguments.run, arguments.step)
    print_replayed(batch, arguments.show)
    return 0 if batch.as_noted and batch.same_data else 1
