"""A finished run once more, in a new folder: is it the same, and if not, which of its inputs has changed?"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ftlab.assembly.data import beside_checkpoint, read_data
from ftlab.config.build import build
from ftlab.config.check import compose_config
from ftlab.config.resolvers import claim_folder, fresh_folder
from ftlab.config.resume import upgraded
from ftlab.config.targets import misfits
from ftlab.data.tokenizers import Tokenizer
from ftlab.errors import ConfigError, ConfigErrors, FtlabError
from ftlab.jobs import launch
from ftlab.lab.compared import Compared, compare_files, compare_lines, untimed
from ftlab.lab.diff import Change, diff, facts_changed, fingerprints, fingerprints_in
from ftlab.lab.runs import RunRecord
from ftlab.models.hub import resolve_checkpoint
from ftlab.outputs.environment import code_state, machine, versions
from ftlab.outputs.files import shortest, to_json
from ftlab.storage.checkpoints import Checkpoints
from ftlab.storage.disk import replace_file

TOLERANCE = 1e-3  # relative difference of a loss: what other kernels and other numbers of ranks make, and a bit more


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """What became of it.

    Attributes:
        verdict: ``bitwise``; ``same as logged``: there are no weights to compare; ``within tolerance``; ``differs``;
            ``inputs changed``: not run again at all.
        inputs: what is no longer what the run was made of: data by fingerprint, code, versions, machine, ranks.
        compared: weights and logs, each whether the same; empty where it was not run again.
        largest: relative difference of a loss at any step or at the end; None where no loss was compared.
        folder: the new run's; None where there is none.
    """

    verdict: str
    inputs: list[Change]
    compared: list[Compared]
    largest: float | None
    folder: Path | None


def reproduce(run: RunRecord) -> Reproduced:
    """Run ``run`` again, unless its data has changed, and compare weights and logs.

    Raises:
        ConfigError: the run did not complete, or was changed on its way, so that no one configuration makes it; or
            it left nothing to compare with.
        FtlabError: the new run failed.
    """
    config = _config(run)
    changed = _data(run, config)
    surroundings = _surroundings(run)
    if changed:
        return Reproduced(
            verdict="inputs changed", inputs=changed + surroundings, compared=[], largest=None, folder=None
        )
    folder = Path(claim_folder(fresh_folder("outputs", f"{run.name}_reproduced"))).absolute()
    config["paths"]["output_dir"] = str(folder)
    if launch(config, own_process=True):
        raise FtlabError(f"the run in {folder} failed; train.log says why")
    again = RunRecord(folder)
    weights, logged, largest = _weights(run, again), _logged(run, again), _largest(run, again)
    if all(one.same for one in (*weights, *logged)):
        verdict = "bitwise" if weights else "same as logged"
    else:
        verdict = "within tolerance" if largest is not None and largest <= TOLERANCE else "differs"
    found = Reproduced(
        verdict=verdict,
        inputs=surroundings + facts_changed(run, again),
        compared=weights + logged,
        largest=largest,
        folder=folder,
    )
    told = {"of": str(run.folder)} | asdict(found) | {"folder": str(folder)}
    replace_file(folder / "reproduce.json", to_json(told, indent=2) + "\n")
    return found


def _config(run: RunRecord) -> dict[str, Any]:
    if run.status != "completed":
        raise ConfigError("RUN", f"{run.folder} is {run.status}; only a completed run has an end to compare with")
    typed = [text for session in run.record.get("resumed") or [] for text in session.get("overrides") or []]
    if typed:
        problem = f"was changed on its way: {' '.join(typed)}; no one configuration makes it"
        raise ConfigError("RUN", f"{run.folder} {problem}")
    if not (Checkpoints(run.folder / "checkpoints").complete() or run.final_metrics):
        raise ConfigError("RUN", f"{run.folder} has neither checkpoints nor metrics: there is nothing to compare")
    if not run.config:
        raise ConfigError("RUN", f"{run.folder} has no config.yaml that can be read")
    config = upgraded(run.config, run.folder)
    config |= {name: node for name, node in compose_config().items() if name not in config}  # where that cannot tell
    config["resume"] = None
    quiet = ("ConsoleLogger", "JsonlLogger")  # W&B's key is masked, and this is no run to look at there
    config["logger"] = {name: node for name, node in config["logger"].items() if node["_target_"].endswith(quiet)}
    if problems := list(misfits(config)):  # of other code
        raise ConfigErrors(problems)
    return config


def _data(run: RunRecord, config: dict[str, Any]) -> list[Change]:
    """Which rows, tokenizer or samples are no longer those of the run, with the files that they come from."""
    named = config["model"].get("checkpoint")
    follows = named and config["tokenizer"].get("path") == named
    checkpoint = resolve_checkpoint(named, weights=False) if follows else None
    tokenizer: Tokenizer = build(beside_checkpoint(config["tokenizer"], named, checkpoint))
    before, now = dict(fingerprints(run.folder)), dict(fingerprints_in(read_data(config, tokenizer).report))
    return [
        Change(f"{name}{_files(config, name)}", before[name], now.get(name))
        for name in before
        if before[name] != now.get(name)
    ]


def _files(config: dict[str, Any], name: str) -> str:
    """The files behind a fingerprint, where they are files."""
    of_set, _, part = name.rpartition(".")
    node = config["dataset"]["sets"].get(of_set, {}) if of_set else config["dataset"]
    files = config["tokenizer"].get("path") if part == "tokenizer" else node.get("data_files")
    return f" ({files})" if files and part != "dataset" else ""


def _surroundings(run: RunRecord) -> list[Change]:
    """Code, versions and machine, where they are others."""
    here = {"code": code_state(), "versions": versions(), "hardware": machine()}
    then = {part: run.part(part) for part in here}
    return [
        Change(f"{part}.{key}", then[part].get(key), value)
        for part, values in here.items()
        for key, value in values.items()
        if then[part].get(key) != value
    ]


def _weights(run: RunRecord, again: RunRecord) -> list[Compared]:
    ends = [Checkpoints(one.folder / "checkpoints").complete()[-1:] for one in (run, again)]
    if not all(ends) or ends[0][0].step != ends[1][0].step:
        return []
    pair = [end[0] for end in ends]
    return [compare_files("weights and optimizer", "rows-", pair), compare_files("random states", "rng-", pair)]


def _logged(run: RunRecord, again: RunRecord) -> list[Compared]:
    """Of both, what there is: the lines of metrics.jsonl, and the last values in run.json."""
    found = []
    if run.metrics or again.metrics:
        found.append(compare_lines("metrics.jsonl", *(one.folder / "metrics.jsonl" for one in (run, again))))
    ours, theirs = (untimed(one.final_metrics) for one in (run, again))
    if ours or theirs:
        differing = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        told = [f"{key} is {ours.get(key)} and {theirs.get(key)}" for key in differing[:1]]
        found.append(Compared("final metrics", not differing, told[0] if told else f"{len(ours)} values equal"))
    return found


def _largest(run: RunRecord, again: RunRecord) -> float | None:
    """The largest relative difference of a training loss at a common step, and of any loss at the end."""
    theirs = dict(again.series("train/loss"))
    pairs = [(value, theirs[step]) for step, value in run.series("train/loss") if step in theirs]
    ends = (run.final_metrics, again.final_metrics)
    pairs += [(ends[0][key], ends[1][key]) for key in ("train/loss", "val/loss") if all(key in end for end in ends)]
    return max((_apart(*pair) for pair in pairs), default=None)


def _apart(one: float | None, other: float | None) -> float:
    if one == other:
        return 0.0
    return math.inf if one is None or other is None else abs(one - other) / max(abs(one), 1e-12)


def print_reproduced(run: RunRecord, found: Reproduced) -> None:
    """For people."""
    console = Console(highlight=False)
    if found.inputs:
        console.print("[bold]no longer as they were")
        for change in found.inputs:
            console.print(f"  {change.key}: {change.before} -> {change.after}", markup=False, soft_wrap=True)
    for one in found.compared:
        console.print(
            f"  {one.what}: {'the same' if one.same else 'NOT the same'}, {one.detail}", markup=False, soft_wrap=True
        )
    if found.folder is not None and found.verdict not in ("bitwise", "same as logged"):
        for parting in diff(run, RunRecord(found.folder)).partings:
            console.print(
                f"  {parting.metric} differs first at step {parting.step}: {parting.before} and {parting.after}"
            )
        if found.largest is not None:
            console.print(f"  a loss differs by {found.largest:.1e} of it at most (tolerance {TOLERANCE:g})")
    where = f"   ({shortest(found.folder)})" if found.folder is not None else "   (not run again)"
    console.print(f"[bold]{found.verdict}[/]{where}", soft_wrap=True)
