"""Does a run that was killed and resumed end as one that was not? Tried on the user's own configuration."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ftlab.config.check import compose_config
from ftlab.config.resolvers import claim_folder, fresh_folder
from ftlab.config.resume import resumed_config
from ftlab.errors import FtlabError
from ftlab.jobs import launch
from ftlab.lab.compared import Compared, compare_files, compare_lines
from ftlab.lab.runs import RunRecord
from ftlab.loggers.base import RunInfo
from ftlab.outputs.files import shortest, to_json
from ftlab.storage.addresses import told
from ftlab.storage.checkpoints import Checkpoints
from ftlab.storage.disk import replace_file
from ftlab.typed import argument


class KillAtStep:
    """A logger that ends its process with SIGKILL when it hears of one step: as sudden as any kill can be."""

    def __init__(self, *, step: int):
        self._step = step

    def start(self, info: RunInfo) -> None:
        pass

    def log(self, metrics: Mapping[str, float], step: int) -> None:  # noqa: ARG002
        if step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        pass

    def finish(self, status: str, summary: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        pass


def verify_resume(overrides: Sequence[str], n_steps: int, extra_dir: Path | None = None) -> tuple[list[Compared], Path]:
    """Train ``n_steps`` steps straight, and once more with a SIGKILL after the checkpoint in the middle and a resume.

    Args:
        n_steps: at least 2: one with a checkpoint, and one after it to be killed in.
        extra_dir: a further folder to search for options.

    Returns:
        What was compared, and the folder with both runs and ``verify_resume.json``.

    Raises:
        FtlabError: when a run that should have ended well, or by SIGKILL, did not; it has said why.
    """
    middle = n_steps // 2
    asked = [
        *(f"trainer.max_steps={n_steps}", f"checkpoint.every_steps={middle}", "checkpoint.every_minutes=null"),
        *("checkpoint.at_end=true", "checkpoint.keep_last=1000", "checkpoint.export=false", "logger=[console,jsonl]"),
        *("trainer.log_every_steps=1",),
    ]
    config = compose_config([*overrides, *asked], extra_dir=extra_dir)
    folder = Path(claim_folder(fresh_folder("outputs", f"{config['run_name']}_verify-resume"))).absolute()
    straight, killed = folder / "straight", folder / "killed_and_resumed"
    _run(_in(config, straight))
    doomed = _in(config, killed)
    doomed["logger"] = config["logger"] | {
        "kill": {"_target_": f"{KillAtStep.__module__}.{KillAtStep.__qualname__}", "step": middle + 1}
    }
    launch(doomed, own_process=True)
    ended = RunRecord(killed).error or {}
    if signal.SIGKILL.name not in ended.get("message", ""):
        how = ended.get("message") or f"is {RunRecord(killed).status}"
        raise FtlabError(f"verify-resume: the run in {killed} was to end by SIGKILL in step {middle + 1}, but: {how}")
    resumed, _ = resumed_config([argument("resume", str(killed))], {"extra_dir": extra_dir})
    resumed["logger"].pop("kill")
    _run(resumed)
    compared = compare_runs(straight, killed)
    verdict = {"steps": n_steps, "killed_after": middle + 1, "same": all(one.same for one in compared)}
    replace_file(folder / "verify_resume.json", to_json(verdict | {"compared": list(map(asdict, compared))}, indent=2))
    return compared, folder


def _in(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    return config | {"paths": config["paths"] | {"output_dir": str(folder)}}


def _run(config: dict[str, Any]) -> None:
    if launch(config, own_process=True):
        raise FtlabError(f"verify-resume: the run in {config['paths']['output_dir']} failed, nothing could be compared")


def compare_runs(one: Path, other: Path) -> list[Compared]:
    """The last checkpoints of two runs, to the bit, and all that they logged but times and memory."""
    ends = [Checkpoints(run / "checkpoints").complete()[-1] for run in (one, other)]
    states = [told(end) for end in ends]
    return [
        compare_files("weights and optimizer", "rows-", ends),
        compare_files("random states", "rng-", ends),
        _values("data cursor", [state["cursor"] for state in states]),
        _values("counts", [{**state["progress"], "train_s": None} for state in states]),
        _values("learning rate", [state["scheduler"] for state in states]),
        _values("loss scale", [state["scaler"] for state in states]),
        *(compare_lines(name, one / name, other / name) for name in ("metrics.jsonl", "samples.jsonl")),
    ]


def _values(what: str, pair: Sequence[Any]) -> Compared:
    same = pair[0] == pair[1]
    return Compared(what, same, _short(pair[0]) if same else f"{_short(pair[0])} != {_short(pair[1])}")


def _short(value: Any) -> str:
    text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
    return (text or "none") if len(text) <= 100 else text[:99] + "…"


def print_compared(compared: Sequence[Compared], folder: Path, n_steps: int) -> None:
    """For people; ``folder`` holds both runs."""
    table = Table(title=f"{n_steps} steps straight, against a SIGKILL in between and a resume")
    for column in ("", "same", ""):
        table.add_column(column)
    for one in compared:
        table.add_row(one.what, "yes" if one.same else "[bold red]NO", one.detail)
    console = Console(width=max(Console().width, 120))
    console.print(table)
    console.print(f"both runs and verify_resume.json: {shortest(folder)}", soft_wrap=True)
