"""``ftlab report``."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ftlab.verbs._types import positive

HELP = "one HTML page and summary.csv on a set of runs"


def declare(parser: ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="runs, or folders of runs: a sweep's")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; default: the folder they share")
    parser.add_argument("--title", help="of the page; default: the first folder's name")
    parser.add_argument("--metric", help="by which to judge runs, e.g. val/exact_match; default: evaluation.metric")
    parser.add_argument(
        "--watch", type=positive, nargs="?", const=10.0, metavar="S", help="again every S seconds (10) while runs go on"
    )


def run(arguments: Namespace) -> None:
    from ftlab.lab.report import watch, write_report
    from ftlab.outputs.files import shortest

    folders = [folder.expanduser().resolve() for folder in arguments.folders]
    out = arguments.out or Path(os.path.commonpath(folders))
    chosen = {"title": arguments.title, "metric": arguments.metric}

    def say(page: Path, going_on: int) -> None:
        print(f"{shortest(page)}: {going_on} running" if going_on else shortest(page), flush=True)

    if arguments.watch is None:
        say(write_report(folders, out, **chosen), 0)
    else:
        watch(folders, out, every_s=arguments.watch, on_written=say, **chosen)
