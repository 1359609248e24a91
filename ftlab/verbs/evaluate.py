"""``ftlab evaluate``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ftlab.verbs._types import declare_config_dir, whole

HELP = "loss and right answers of one or more runs, on any data"


def declare(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="RUN, RUN@STEP or RUN@best; and overrides, see --help")
    declare_config_dir(parser)
    parser.add_argument("--tasks", metavar="A,B", help="tasks of lm-eval instead of a dataset (extra eval)")
    parser.add_argument("--tasks-dir", type=Path, metavar="FOLDER", help="where tasks of your own are defined")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="only the first N questions of each task")
    parser.epilog = "overrides: dataset=OPTION, dataset.KEY=…, evaluation.KEY=…, seq_len=…, device=…"


def run(arguments: Namespace) -> None:
    from rich.console import Console

    from ftlab.lab.evaluate import evaluate, evaluate_tasks, runs_and_overrides, table

    runs, overrides = runs_and_overrides(arguments.runs)
    if arguments.tasks is None:
        found = evaluate(runs, overrides, arguments.config_dir)
    else:
        found = evaluate_tasks(runs, arguments.tasks.split(","), overrides, arguments.tasks_dir, arguments.limit)
    Console(width=max(Console().width, 120)).print(table(found))
