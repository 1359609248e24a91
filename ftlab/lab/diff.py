"""What two runs differ in: settings, code, data, machine, and where what they logged parts. Without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlab.config.layers import leaves
from ftlab.errors import ConfigError
from ftlab.lab.runs import RunRecord, differing, is_run
from ftlab.outputs.environment import commits_between

# What a run leaves behind, shows or is called; none of it reaches the weights.
_NO_EFFECT = (
    *("checkpoint.", "evaluation.", "logger.", "paths.", "sweep.", "run_name", "resume"),
    *("trainer.log_every_steps", "trainer.measure_lost_updates", "trainer.profile_steps", "parallelism.timeout_s"),
)
_ENDS = ("evaluation.patience", "evaluation.metric")  # of evaluation, what can end a run
# Causes before what follows from them.
_ORDER = (
    "init_from",
    "model.",
    "tokenizer.",
    "dataset.",
    "seq_len",
    "seed",
    "loss.",
    "optimizer.",
    "scheduler.",
    "precision.",
)
_NOT_COMPARED = ("perf/", "memory/", "time/")  # metrics that no two runs share
_NO_METRIC = ("step", "epoch", "non_finite")
_COMMITS = 12  # that are told


@dataclass(frozen=True)
class Change:
    """Something that has one value in the first run and another in the second.

    Attributes:
        decides: whether it can change what is trained.
    """

    key: str
    before: Any
    after: Any
    decides: bool = True


@dataclass(frozen=True)
class Parting:
    """The first step at which a metric that both runs logged there differs."""

    metric: str
    step: int
    before: float | str | None  # "nan", "inf", "-inf" where it was not finite
    after: float | str | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """All that two runs differ in.

    Attributes:
        settings: what was typed first, then causes before consequences.
        commits: what lies between the two states of the code, newest first, where git knows.
        inputs: fingerprints of rows, tokenizer and samples, how many, and where the weights came from.
        environment: versions, hardware, ranks and what came of them, of later sessions too.
        common_steps: steps at which both logged something.
        partings: by step; empty where every common line is equal to the bit.
        samples: of the first parting's step, in each run, as its ranks noted them.
        ends: last values.
        unknown: of ``settings``, ``code`` and ``inputs`` those that cannot be told to be the same, and why.
    """

    runs: tuple[RunRecord, RunRecord]
    settings: list[Change]
    code: list[Change]
    commits: list[str]
    inputs: list[Change]
    environment: list[Change]
    common_steps: int
    partings: list[Parting]
    samples: tuple[list[int], list[int]]
    ends: list[Change]
    unknown: dict[str, str]

    @property
    def same(self) -> bool:
        """Whether nothing differs that can change what is trained, nor what was logged, as far as a run tells it.

        Uncommitted changes are nothing that a run could tell: what was logged has to do.
        """
        if self.unknown.keys() & {"settings", "inputs"}:
            return False
        decisive = [change for change in self.settings if change.decides]
        return not (decisive or self.code or self.inputs or self.environment or self.partings)

    def as_json(self) -> dict[str, Any]:
        parts = ("settings", "code", "inputs", "environment", "partings", "ends")
        return {
            "runs": [str(run.folder) for run in self.runs],
            **{part: [vars(one) for one in getattr(self, part)] for part in parts},
            "unknown": self.unknown,
            "commits": self.commits,
            "common_steps": self.common_steps,
            "samples": self.samples,
            "same": self.same,
        }


def open_run(text: str) -> RunRecord:
    """The run in the folder that ``text`` names, or ``latest``.

    Raises:
        ConfigError: there is none.
    """
    folder = Path("outputs/latest" if text == "latest" else text).expanduser()
    if not folder.is_dir() or not is_run(folder):
        raise ConfigError("RUN", f"{text} is no run's folder", "outputs/latest, or: ftlab ls")
    return RunRecord(folder.resolve())


def diff(first: RunRecord, second: RunRecord) -> Difference:
    """Compare two runs, whatever state they are in."""
    runs = (first, second)
    partings, common = _partings(first, second)
    codes = [run.part("code") for run in runs]
    unknown = _unknown(runs)
    later = _later_sessions(first, second)
    inputs = [{**({} if "inputs" in unknown else _fingerprints(run)), **_other_inputs(run)} for run in runs]
    return Difference(
        runs=runs,
        settings=[] if "settings" in unknown else _settings(first, second),
        code=_changes("code", codes[0], codes[1]) + [change for change in later if ".code." in change.key],
        commits=commits_between(codes[0].get("commit"), codes[1].get("commit"))[:_COMMITS],
        inputs=_changes("", inputs[0], inputs[1]) + facts_changed(first, second, ("n_train_samples",)),
        environment=[
            *(
                change
                for part in ("versions", "hardware")
                for change in _changes(part, first.part(part), second.part(part))
            ),
            *facts_changed(first, second),
            *(change for change in later if ".code." not in change.key),
        ],
        common_steps=common,
        partings=partings,
        samples=(_samples(first, partings), _samples(second, partings)),
        ends=[
            change
            for change in _changes("", first.final_metrics, second.final_metrics)
            if not change.key.startswith(_NOT_COMPARED)
        ],
        unknown=unknown,
    )


def _unknown(runs: tuple[RunRecord, RunRecord]) -> dict[str, str]:
    def lacking(found: list[Any]) -> str:
        return " and ".join(name for name, one in zip("AB", found, strict=True) if not one)

    unknown = {}
    if without := lacking([run.config for run in runs]):
        unknown["settings"] = f"not known: no config.yaml in {without}"
    if without := lacking([_fingerprints(run) for run in runs]):
        unknown["inputs"] = f"not known: no fingerprints in {without}"
    codes = [run.part("code") for run in runs]
    if codes[0] == codes[1] and codes[0].get("dirty"):
        unknown["code"] = "the same commit; both with uncommitted changes, which are not known to be equal"
    return unknown


def facts_changed(
    first: RunRecord, second: RunRecord, facts: Sequence[str] = ("device", "attention", "global_batch_size")
) -> list[Change]:
    """What came of a run's settings where it ran, the number of its ranks too; where both runs know it."""
    found = [{name: run.record[name] for name in facts if run.record.get(name) is not None} for run in (first, second)]
    return [change for change in _changes("", *found) if change.before is not None and change.after is not None]


def _later_sessions(first: RunRecord, second: RunRecord) -> list[Change]:
    """What differs in code, versions, machine or ranks after the runs were gone on with, told once.

    A run that was gone on with less often is compared as it was in its last session.
    """
    sessions = [_sessions(run) for run in (first, second)]
    changes: list[Change] = []
    told = [(key, sessions[0][0].get(key), sessions[1][0].get(key)) for key in {**sessions[0][0], **sessions[1][0]}]
    for number in range(1, max(map(len, sessions))):
        one, other = (found[min(number, len(found) - 1)] for found in sessions)
        for change in _changes("", one, other):
            known = "ranks" not in change.key or None not in (change.before, change.after)
            if known and (change.key, change.before, change.after) not in told:
                told.append((change.key, change.before, change.after))
                changes.append(Change(f"resumed[{number - 1}].{change.key}", change.before, change.after))
    return changes


def _sessions(run: RunRecord) -> list[dict[str, Any]]:
    """Code, versions, machine and, as far as they are known, ranks of each session: flat."""
    resumed = run.record.get("resumed")
    later = [one for one in resumed if isinstance(one, dict)] if isinstance(resumed, list) else []
    parts = ("code", "versions", "hardware", "ranks")
    return [dict(leaves({part: one[part] for part in parts if part in one})) for one in (run.record, *later)]


def _changes(prefix: str, before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    name = f"{prefix}." if prefix else ""
    keys = {**before, **after}
    return [Change(f"{name}{k}", before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)]


def _settings(first: RunRecord, second: RunRecord) -> list[Change]:
    decisive = differing([first, second])
    a, b = first.settings, second.settings
    rest = {
        key: [a.get(key), b.get(key)] for key in {**a, **b} if key.startswith(_NO_EFFECT) and a.get(key) != b.get(key)
    }
    typed = {_key(text) for text in set(_typed(first)) ^ set(_typed(second))}

    def rank(change: Change) -> tuple[bool, bool, int, bool]:
        was_typed = any(change.key == key or change.key.startswith(f"{key}.") for key in typed)
        place = next((i for i, prefix in enumerate(_ORDER) if change.key.startswith(prefix)), len(_ORDER))
        return (not change.decides, not was_typed, place, not change.key.endswith("_target_"))

    changes = [Change(key, before, after, _decides(key)) for key, (before, after) in (decisive | rest).items()]
    return sorted(changes, key=rank)


def _decides(key: str) -> bool:
    return not key.startswith(_NO_EFFECT) or key in _ENDS


def _typed(run: RunRecord) -> list[str]:
    sessions = run.record.get("resumed")
    later = [text for one in sessions for text in one.get("overrides", [])] if isinstance(sessions, list) else []
    return [*run.overrides, *map(str, later)]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _fingerprints(run: RunRecord) -> dict[str, Any]:
    found: dict[str, Any] = dict(fingerprints(run.folder))
    if not found and run.record.get("data_fingerprint"):
        found["dataset"] = run.record["data_fingerprint"]
    return found


def _other_inputs(run: RunRecord) -> dict[str, Any]:
    weights = run.part("weights")
    found = {"weights.commit": weights["commit"]} if weights.get("commit") else {}
    return found | ({"parent_run": run.record["parent_run"]} if run.record.get("parent_run") else {})


def fingerprints(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and fingerprint of every input in the run's ``data_report.json``; of a mixture, of each set's."""
    try:
        report = json.loads((folder / "data_report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    yield from fingerprints_in(report)


def fingerprints_in(report: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The same, of a report."""
    if not isinstance(report, dict):
        return
    for key, value in report.items():
        if key == "fingerprints" and isinstance(value, dict):
            yield from ((f"{name}{part}", str(one)) for part, one in value.items())
        elif key == "sets" and isinstance(value, dict):
            for one, inner in value.items():
                yield from fingerprints_in(inner, f"{one}.")
        elif name and isinstance(value, dict):
            yield from fingerprints_in(value, name)


def _partings(first: RunRecord, second: RunRecord) -> tuple[list[Parting], int]:
    logged = [_by_step(run) for run in (first, second)]
    common = sorted(set(logged[0]) & set(logged[1]))
    found: dict[str, Parting] = {}
    for step in common:
        one, other = logged[0][step], logged[1][step]
        for metric in one:
            if metric in other and metric not in found and one[metric] != other[metric]:
                found[metric] = Parting(metric, step, one[metric], other[metric])
    return sorted(found.values(), key=lambda parting: parting.step), len(common)


def _by_step(run: RunRecord) -> dict[int, dict[str, Any]]:
    steps: dict[int, dict[str, Any]] = {}
    for row in run.metrics:
        words = row.get("non_finite")  # null in JSON, spelled out here
        values = row | words if isinstance(words, dict) else row
        kept = {k: v for k, v in values.items() if k not in _NO_METRIC and not k.startswith(_NOT_COMPARED)}
        steps.setdefault(row["step"], {}).update(kept)
    return steps


def _samples(run: RunRecord, partings: list[Parting]) -> list[int]:
    if not partings or not partings[0].step:
        return []
    from ftlab.training.ledger import seen_at  # needs torch, which only this question does

    try:
        return [i for _, ids in sorted(seen_at(run.folder / "ledger", partings[0].step).items()) for i in ids]
    except (OSError, ValueError):
        return []
