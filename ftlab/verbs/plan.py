"""``ftlab plan``."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from ftlab.verbs._types import declare_overrides, not_negative, positive, whole

HELP = "parameters, memory, steps, time and cost of a run, beforehand"


def declare(parser: ArgumentParser) -> None:
    declare_overrides(parser)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--rows", type=whole(1), metavar="N", help="training rows, where the data is not at hand")
    parser.add_argument("--row-tokens", type=positive, metavar="N", help="their mean length in tokens")
    parser.add_argument(
        "--tokens-per-s", type=_throughput, metavar="N|RUN", help="of all ranks; or a run that measured it"
    )
    parser.add_argument("--price-per-hour", type=not_negative, metavar="X", help="of one device")
    parser.add_argument(
        "--memory-gib", type=positive, metavar="N", help="of one GPU, when planning for another machine"
    )


def run(arguments: Namespace) -> int:
    from ftlab.lab.plan import Given, plan
    from ftlab.lab.plan_table import print_plan

    names = ("rows", "row_tokens", "tokens_per_s", "price_per_hour", "memory_gib")
    given = Given(**{name: getattr(arguments, name) for name in names})
    found = plan(arguments.overrides, given, arguments.config_dir)
    if arguments.json:
        print(json.dumps(found))
    else:
        print_plan(found)
    return 0 if found["memory"]["fits"] else 1


def _throughput(text: str) -> float:
    """A number of tokens per second, or the one in a finished run's run.json."""
    run = Path(text) / "run.json"
    if not run.is_file():
        if "/" in text or Path(text).exists():
            raise ArgumentTypeError(f"{text} is no run's folder: it has no run.json")
        return positive(text)
    try:
        measured = json.loads(run.read_text(encoding="utf-8"))["metrics"]["perf/tokens_per_s"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ArgumentTypeError(f"{run} has no tokens_per_s: did that run reach its end?") from None
    return positive(str(measured))
