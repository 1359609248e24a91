"""The verbs beside training: ``python -m ftlab VERB`` or ``ftlab VERB``.

Each verb is one function that takes its own arguments; torch is imported only by those that need it.
"""

from __future__ import annotations

import argparse
import json
import os
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
        from ftlab.outputs.secrets import mask_secrets

        print(mask_secrets(str(error)), file=sys.stderr)
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

    torchtune = verbs.add_parser("from-torchtune", help="the command for a configuration of torchtune")
    torchtune.add_argument("config", type=Path, metavar="CONFIG.yaml", help="of a full fine-tuning recipe of 0.6.1")
    torchtune.add_argument("overrides", nargs="*", help="key=value, as for tune run")
    torchtune.add_argument("--nproc-per-node", type=int, metavar="N", help="as for tune run; default: all GPUs")
    torchtune.add_argument("--recipe", choices=("full_finetune_single_device", "full_finetune_distributed"))
    torchtune.set_defaults(verb=_from_torchtune)

    verify = verbs.add_parser("verify-parallel", help="whether parallelism changes what a configuration computes")
    verify.add_argument("--steps", type=int, default=5, metavar="N", help="optimizer steps to compare (default 5)")
    verify.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    verify.set_defaults(verb=_verify_parallel)

    resume = verbs.add_parser("verify-resume", help="whether a killed and resumed run ends as one that was not")
    resume.add_argument("--steps", type=int, default=10, metavar="N", help="optimizer steps to train (default 10)")
    resume.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    resume.set_defaults(verb=_verify_resume)

    listing = verbs.add_parser("ls", help="which runs there are")
    listing.add_argument("words", nargs="*", metavar="FOLDER|FILTER", help="e.g. outputs status=failed 'val/loss<2'")
    listing.add_argument("--sort", default="started", metavar="KEY", help="fact, setting or metric (default started)")
    listing.add_argument("--columns", default="", metavar="K,K", help="further ones: settings or metrics")
    listing.add_argument("--json", action="store_true", help="for programs")
    listing.set_defaults(verb=_ls)

    tree = verbs.add_parser("tree", help="which run came from which: forks and resumes")
    tree.add_argument("words", nargs="*", metavar="FOLDER|FILTER", help="as for ls")
    tree.set_defaults(verb=_tree)

    difference = verbs.add_parser("diff", help="what two runs differ in, and from which step on it shows")
    difference.add_argument("first", metavar="A", help="run folder")
    difference.add_argument("second", metavar="B", help="run folder")
    difference.add_argument("--json", action="store_true", help="for programs")
    difference.set_defaults(verb=_diff)

    again = verbs.add_parser("reproduce", help="a completed run once more: bitwise the same, or what has changed?")
    again.add_argument("run", help="run folder, e.g. outputs/latest")
    again.set_defaults(verb=_reproduce)

    export = verbs.add_parser("export", help="a checkpoint as a Hugging Face folder, read back and compared")
    export.add_argument("run", help="RUN, RUN@STEP, RUN@best or RUN/checkpoints/step_N")
    export.add_argument("out", type=Path, help="folder to make")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the files; default: the weights' own")
    export.add_argument("--layout", choices=("hf", "meta"), default="hf", help="Hugging Face's (default) or Meta's")
    export.set_defaults(verb=_export)

    check = verbs.add_parser("check-data", help="what is wrong with the data, and what of it is trained")
    check.add_argument("--out", type=Path, default=Path("outputs/check-data"), metavar="FOLDER")
    check.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    check.set_defaults(verb=_check_data)

    replay = verbs.add_parser("replay", help="the batch of one step of a run, built again and compared")
    replay.add_argument("run", type=Path, help="run folder, e.g. outputs/latest")
    replay.add_argument("--step", type=int, required=True, metavar="N", help="optimizer step, counted from 1")
    replay.add_argument("--show", type=int, default=3, metavar="N", help="samples to show whole (default 3)")
    replay.set_defaults(verb=_replay)

    evaluate = verbs.add_parser("evaluate", help="loss and right answers of one or more runs, on any data")
    evaluate.add_argument("runs", nargs="+", metavar="RUN", help="RUN, RUN@STEP or RUN@best; and overrides, see --help")
    evaluate.add_argument("--tasks", metavar="A,B", help="tasks of lm-eval instead of a dataset (extra eval)")
    evaluate.add_argument("--tasks-dir", type=Path, metavar="FOLDER", help="where tasks of your own are defined")
    evaluate.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    evaluate.epilog = "overrides: dataset=OPTION, dataset.KEY=…, evaluation.KEY=…, seq_len=…, device=…"
    evaluate.set_defaults(verb=_evaluate)

    report = verbs.add_parser("report", help="one HTML page and summary.csv on a set of runs")
    report.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="runs, or folders of runs: a sweep's")
    report.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; default: the folder they share")
    report.add_argument("--title", help="of the page; default: the first folder's name")
    report.add_argument("--metric", help="by which to judge runs, e.g. val/exact_match; default: evaluation.metric")
    report.add_argument(
        "--watch", type=float, nargs="?", const=10.0, metavar="S", help="again every S seconds (10) while runs go on"
    )
    report.set_defaults(verb=_report)

    generate = verbs.add_parser("generate", help="ask the model of a finished run")
    generate.add_argument("run", help="RUN, RUN@STEP or RUN@best, e.g. outputs/latest")
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


def _from_torchtune(arguments: argparse.Namespace) -> None:
    from ftlab.lab.from_torchtune import as_script, from_torchtune

    given = {"recipe": arguments.recipe, "nproc_per_node": arguments.nproc_per_node}
    print(as_script(from_torchtune(arguments.config, arguments.overrides, **given), arguments.config))


def _throughput(text: str) -> float:
    """A number of tokens per second, or the one in a finished run's run.json."""
    run = Path(text) / "run.json"
    if not run.is_file():
        return float(text)
    measured = json.loads(run.read_text(encoding="utf-8")).get("metrics") or {}
    if "perf/tokens_per_s" not in measured:
        raise argparse.ArgumentTypeError(f"{run} has no tokens_per_s: did that run reach its end?")
    return float(measured["perf/tokens_per_s"])


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


def _verify_resume(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ftlab.lab.resume import verify_resume
    from ftlab.outputs.files import shortest

    compared, folder = verify_resume(arguments.overrides, arguments.steps)
    table = Table(title=f"{arguments.steps} steps straight, against a SIGKILL in between and a resume")
    for column in ("", "same", ""):
        table.add_column(column)
    for one in compared:
        table.add_row(one.what, "yes" if one.same else "[bold red]NO", one.detail)
    console = Console(width=max(Console().width, 120))
    console.print(table)
    console.print(f"both runs and verify_resume.json: {shortest(folder)}", soft_wrap=True)
    return 0 if all(one.same for one in compared) else 1


def _ls(arguments: argparse.Namespace) -> None:
    from ftlab.lab.listing import as_rows, print_runs, select

    runs = select(arguments.words, arguments.sort)
    if arguments.json:
        print(json.dumps(as_rows(runs)))
    else:
        print_runs(runs, [key for key in arguments.columns.split(",") if key])


def _tree(arguments: argparse.Namespace) -> None:
    from ftlab.lab.listing import print_tree, select

    print_tree(select(arguments.words))


def _diff(arguments: argparse.Namespace) -> int:
    from ftlab.lab.diff import diff, open_run, print_difference

    found = diff(open_run(arguments.first), open_run(arguments.second))
    if arguments.json:
        print(json.dumps(found.as_json()))
    else:
        print_difference(found)
    return 0 if found.same else 1


def _reproduce(arguments: argparse.Namespace) -> int:
    from ftlab.lab.diff import open_run
    from ftlab.lab.reproduce import print_reproduced, reproduce

    run = open_run(arguments.run)
    found = reproduce(run)
    print_reproduced(run, found)
    return 0 if found.verdict in ("bitwise", "within tolerance") else 1


def _export(arguments: argparse.Namespace) -> None:
    from ftlab.lab.export import export

    proof = export(arguments.run, arguments.out, arguments.dtype, arguments.layout)
    print(f"{arguments.out}: read back; largest difference of a logit {proof.max_abs_diff:.3g}", end="")
    print(f" (logits up to {proof.max_abs_logit:.3g}), every tensor equal to the bit")


def _check_data(arguments: argparse.Namespace) -> int:
    from ftlab.lab.check_data import check_data

    return check_data(arguments.overrides, arguments.out)


def _replay(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from ftlab.lab.replay import replay
    from ftlab.lab.terminal import print_sample

    batch = replay(arguments.run, arguments.step)
    console = Console(highlight=False)
    n_tokens = sum(len(sample.tokens) for sample in batch.samples)
    console.print(f"step {batch.step}, epoch {batch.epoch}: {len(batch.samples)} samples, {n_tokens} tokens")
    for rank, ids in sorted(batch.noted.items()):
        console.print(f"  rank {rank} saw {', '.join(map(str, ids)) or 'none'}", soft_wrap=True)
    for sample in batch.samples[: arguments.show]:
        print_sample(console, sample, batch.tokenizer)
    if not batch.same_data:
        console.print("\n[bold red]the data is no longer what the run was trained on: its fingerprint differs")
    verdict = "exactly the samples that the run noted" if batch.as_noted else "[bold red]NOT what the run noted"
    console.print(f"\n{verdict}")
    return 0 if batch.as_noted and batch.same_data else 1


def _evaluate(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from ftlab.lab.evaluate import evaluate, evaluate_tasks, runs_and_overrides, table

    runs, overrides = runs_and_overrides(arguments.runs)
    if arguments.tasks is None:
        found = evaluate(runs, overrides)
    else:
        found = evaluate_tasks(runs, arguments.tasks.split(","), overrides, arguments.tasks_dir, arguments.limit)
    Console(width=max(Console().width, 120)).print(table(found))


def _report(arguments: argparse.Namespace) -> None:
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
