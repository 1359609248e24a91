"""Runs measured after the fact: loss and right answers on any dataset, and lm-eval's tasks on the exported folder."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ftlab.assembly.data import read_data
from ftlab.config.build import build
from ftlab.config.resume import overlaid
from ftlab.data.samples import JoinedSamples, Samples
from ftlab.errors import ConfigError, FtlabError
from ftlab.lab.export import export
from ftlab.lab.runs import RunRecord
from ftlab.lab.trained import find_checkpoint, find_export, open_trained
from ftlab.losses import CrossEntropy
from ftlab.outputs.environment import now
from ftlab.outputs.files import shortest, to_json
from ftlab.storage.disk import replace_file
from ftlab.training.evaluate import EvaluationConfig, Evaluator

log = logging.getLogger(__name__)

Evaluation = dict[str, Any]
MAY_CHANGE = ("dataset.", "evaluation.", "seq_len", "device", "paths.cache_dir", "precision.compute_dtype")


def runs_and_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The two kinds of arguments apart: what looks like ``key=value`` is one, unless it is a folder's name.

    Raises:
        ConfigError: no run is among them.
    """

    def is_override(text: str) -> bool:
        return bool(re.match(r"[+~]*[a-z_][\w.@]*=", text)) and not Path(text.partition("@")[0]).exists()

    runs = [text for text in arguments if not is_override(text)]
    if not runs:
        raise ConfigError("RUN", "no run is named, only overrides", "ftlab evaluate outputs/latest …")
    return runs, [text for text in arguments if is_override(text)]


def evaluate(runs: Sequence[str], overrides: Sequence[str] = (), extra_dir: Path | None = None) -> list[Evaluation]:
    """Measure each run on its own validation rows, or on those that ``overrides`` describe.

    The loss is plain cross-entropy whatever a run was trained with, and it and the answers are computed in one process.
    Each finding is added to ``evaluation.json`` of its run, from where reports take it.

    Args:
        runs: addresses.
        overrides: of ``dataset``, ``evaluation``, ``seq_len``, ``device``, as for ``train.py``.
        extra_dir: a further folder to search for options.

    Raises:
        ConfigError, ConfigErrors, DataError, CheckpointError: whatever is wrong with runs, values or rows.
    """
    return [_evaluate(address, list(overrides), extra_dir) for address in runs]


def _evaluate(address: str, overrides: list[str], extra_dir: Path | None) -> Evaluation:
    device = next((text.partition("=")[2] for text in overrides if text.startswith("device=")), None)
    trained = open_trained(address, device)
    config = trained.config
    if overrides:
        config = overlaid(config, overrides, trained.run, MAY_CHANGE, extra_dir)
    data = read_data(config, trained.tokenizer)
    rows = data.validation
    if rows is None or not len(rows):
        raise ConfigError(
            "dataset", f"{config['dataset']['source']} has no validation rows", "dataset.val_fraction=0.05"
        )
    evaluation: EvaluationConfig = build(config["evaluation"])
    samples: list[dict[str, Any]] = []
    evaluator = Evaluator(
        config=evaluation,
        validation=rows,
        tokenizer=trained.tokenizer,
        end_ids=trained.end_ids,
        loss=CrossEntropy(label_smoothing=0.0, z_loss=0.0),
        on_samples=lambda some, _: samples.extend(some),
        by_number=True,
    )
    _warn_of_short_answers(rows, evaluation)
    metrics = evaluator(trained.model, trained.step or 1, trained.precision, trained.parallel)
    return _note(
        trained.run,
        step=trained.step,
        weights=str(trained.source.relative_to(trained.run)),
        on=_name(config["dataset"]),
        scores={name.removeprefix("val/"): value for name, value in metrics.items()},
        rows=len(rows),
        data_fingerprint=data.fingerprint,
        overrides=overrides,
        samples=samples,
    )


def _name(dataset: dict[str, Any]) -> str:
    """What a set is called in tables: its source, or the file that its rows are in."""
    files = dataset.get("val_data_files") or dataset.get("data_files")
    first = files[0] if isinstance(files, list) else files
    return Path(str(first)).name if first else str(dataset["source"])


def _warn_of_short_answers(rows: Samples | JoinedSamples, evaluation: EvaluationConfig) -> None:
    """An answer that is cut off is never right."""
    some = range(min(len(rows), 256))
    lengths = [len(rows.sample(i).tokens) - len(rows.prompt_tokens(i)) - 1 for i in some]  # EOS need not be generated
    longer = float(np.mean(np.array(lengths) > evaluation.max_new_tokens)) if lengths else 0.0
    if longer > 0.05 and evaluation.n_samples:
        log.warning(
            "evaluation.max_new_tokens=%d: %.0f %% of the references are longer, up to %d tokens; answers are cut\n"
            "  try: evaluation.max_new_tokens=%d",
            *(evaluation.max_new_tokens, 100 * longer, max(lengths), 2 ** int(np.ceil(np.log2(max(lengths))))),
        )


def _note(run: Path, **found: Any) -> Evaluation:
    """Add a finding to the run's ``evaluation.json``."""
    evaluation = {"at": now().isoformat(timespec="seconds"), **found}
    earlier = RunRecord(run).evaluations
    replace_file(run / "evaluation.json", to_json([*earlier, evaluation], indent=2) + "\n")
    return {"run": run, **evaluation}


def table(evaluations: Sequence[Evaluation]) -> Table:
    """Runs by scores, of each set its own columns; those of families of tasks are in ``evaluation.json``."""
    scores = {(one["on"], name): None for one in evaluations for name in one["scores"] if "/" not in name}
    shown = Table(title=" and ".join(dict.fromkeys(str(one["on"]) for one in evaluations)))
    shown.add_column("run", overflow="fold")
    shown.add_column("step", justify="right")
    several = len({on for on, _ in scores}) > 1
    for on, name in scores:
        shown.add_column(f"{on}: {name}" if several else name, justify="right")
    rows: dict[tuple[Path, Any], dict[tuple[str, str], float]] = {}
    for one in evaluations:
        row = rows.setdefault((one["run"], one["step"]), {})
        row |= {(one["on"], name): value for name, value in one["scores"].items()}
    for (run, step), row in rows.items():
        cells = (f"{row[key]:.4f}" if key in row else "–" for key in scores)
        shown.add_row(str(shortest(run)), "–" if step is None else f"{step:,}", *cells)
    return shown


# ---- lm-eval


def evaluate_tasks(
    runs: Sequence[str],
    tasks: Sequence[str],
    overrides: Sequence[str] = (),
    tasks_dir: Path | None = None,
    limit: int | None = None,
) -> list[Evaluation]:
    """Measure each run with tasks of lm-eval (EleutherAI's harness), which reads the exported folder by transformers.

    Args:
        tasks: as lm-eval names them.
        overrides: only ``device``.
        tasks_dir: a folder with definitions of further tasks, lm-eval's YAML.
        limit: only so many questions of each.

    Raises:
        ConfigError: lm-eval is not installed, or has no such task.
        FtlabError: a task's data cannot be had.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("--tasks", "lm-eval is not installed", "pip install 'ftlab[eval]'")
    other = [text for text in overrides if not text.startswith("device=")]
    if other:
        raise ConfigError(other[0].partition("=")[0], "has no meaning for lm-eval's tasks, which bring their own data")
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks_dir) if tasks_dir else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        known = f"{len(manager.all_tasks):,} that lm-eval {lm_eval.__version__} knows"
        raise ConfigError("--tasks", f"{', '.join(unknown)} is none of the {known}", "lm-eval ls tasks")
    return [found for address in runs for found in _measure(address, list(tasks), manager, overrides, limit)]


def _measure(
    address: str, tasks: list[str], manager: Any, overrides: Sequence[str], limit: int | None
) -> Iterator[Evaluation]:
    import lm_eval

    device = next((text.partition("=")[2] for text in overrides), "auto")
    with _folder(address) as (run, folder, step):
        try:
            results = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(folder), "dtype": "auto"},
                tasks=tasks,
                task_manager=manager,
                limit=limit,
                device=None if device == "auto" else device,
                batch_size=8,
                bootstrap_iters=0,
            )["results"]
        except (OSError, ConnectionError) as error:
            raise FtlabError(f"--tasks: {', '.join(tasks)}: its data cannot be had: {error}") from error
        for task in tasks:
            measured = results.get(task, {})
            scores = {
                name.removesuffix(",none").replace(",", ", "): float(value)
                for name, value in measured.items()
                if isinstance(value, (int, float)) and "stderr" not in name and name != "sample_len"
            }
            harness = f"lm-eval {lm_eval.__version__}"
            yield _note(run, step=step, on=task, scores=scores, rows=measured.get("sample_len"), harness=harness)


@contextmanager
def _folder(address: str) -> Iterator[tuple[Path, Path, int | None]]:
    """The run, and a Hugging Face folder of its weights: what it exported, or one made for the time being."""
    if (exported := find_export(address)) is not None:
        yield exported.run, exported.folder, exported.step
        return
    found = find_checkpoint(address)
    with tempfile.TemporaryDirectory(prefix="ftlab-") as scratch:
        export(address, Path(scratch) / "export", None, "hf")
        yield found.path.parent.parent, Path(scratch) / "export", found.step
