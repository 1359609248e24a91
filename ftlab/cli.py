"""The verbs beside training: ``python -m ftlab VERB`` or ``ftlab VERB``.

Each verb is one function that takes its own arguments; torch is imported only by those that need it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ftlab.errors import FtlabError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.verb(arguments) or 0
    except FtlabError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ftlab", description="Fine-tuning as experiments: what there is beside train.py."
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    explain = verbs.add_parser("explain", help="where a configuration value comes from")
    explain.add_argument("key", help="dotted key, e.g. optimizer.lr")
    explain.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    explain.set_defaults(verb=_explain)

    plan = verbs.add_parser("plan", help="parameters, memory, steps, time and cost of a run, beforehand")
    plan.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    plan.add_argument("--json", action="store_true", help="for programs")
    plan.add_argument("--rows", type=int, metavar="N", help="training rows, where the data is not at hand")
    plan.add_argument("--row-tokens", type=float, metavar="N", help="their mean length in tokens")
    plan.add_argument(
        "--tokens-per-s", type=_throughput, metavar="N|RUN", help="of all ranks; or a run that measured it"
    )
    plan.add_argument("--price-per-hour", type=float, metavar="X", help="of one device")
    plan.add_argument("--memory-gib", type=float, metavar="N", help="of one GPU, when planning for another machine")
    plan.set_defaults(verb=_plan)

    verify = verbs.add_parser("verify-parallel", help="whether parallelism changes what a configuration computes")
    verify.add_argument("--steps", type=int, default=5, metavar="N", help="optimizer steps to compare (default 5)")
    verify.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    verify.set_defaults(verb=_verify_parallel)

    generate = verbs.add_parser("generate", help="ask the model of a finished run")
    generate.add_argument("run", type=Path, help="run folder, e.g. outputs/latest")
    generate.add_argument("prompt", help="the instruction; the run's own template is put around it")
    generate.add_argument("--input", default="", help="further context, Alpaca's input field")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from this share of probability")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling")
    generate.set_defaults(verb=_generate)
    return parser


def _explain(arguments: argparse.Namespace) -> None:
    from ftlab.config.explain import explain

    print(explain(arguments.key, arguments.overrides))


def _throughput(text: str) -> float:
    """A number of tokens per second, or the one in a finished run's run.json."""
    run = Path(text) / "run.json"
    if not run.is_file():
        return float(text)
    return float(json.loads(run.read_text(encoding="utf-8"))["final_metrics"]["perf/tokens_per_s"])


def _plan(arguments: argparse.Namespace) -> int:
    from ftlab.lab.plan import Given, plan
    from ftlab.lab.plan_table import print_plan

    names = ("rows", "row_tokens", "tokens_per_s", "price_per_hour", "memory_gib")
    found = plan(arguments.overrides, Given(**{name: getattr(arguments, name) for name in names}))
    if arguments.json:
        print(json.dumps(found))
    else:
        print_plan(found)
    return 0 if found["memory"]["fits"] else 1


def _verify_parallel(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ftlab.lab.verify import verify_parallel

    deviations, tolerance = verify_parallel(arguments.overrides, arguments.steps)
    table = Table(title=f"largest relative deviation from a single process over {arguments.steps} steps")
    for column in ("parallelism", "loss", "norm", "gradient", "of parameter", f"within {tolerance:g}"):
        table.add_column(column, no_wrap=True)
    for one in deviations:
        numbers = (f"{value:.1e}" for value in (one.loss, one.grad_norm, one.gradient))
        table.add_row(
            one.name,
            *numbers,
            one.parameter.removesuffix(".weight"),
            "yes" if one.within(tolerance) else "[bold red]NO",
        )
    Console(width=max(Console().width, 120)).print(table)
    return 0 if all(one.within(tolerance) for one in deviations) else 1


def _generate(arguments: argparse.Namespace) -> None:
    from ftlab.lab.ask import ask

    ask(
        arguments.run,
        arguments.prompt,
        input=arguments.input,
        on_text=lambda text: print(text, end="", flush=True),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    print()
