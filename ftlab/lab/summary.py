"""The table of runs: only the settings that differ, and what came of them."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ftlab.lab.runs import RunRecord, differing
from ftlab.lab.statistics import Interval, interval, paired, pareto
from ftlab.outputs.files import to_json
from ftlab.storage.checkpoints import less_is_better

Cell = str | float | int | bool | None


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table.

    Attributes:
        key: a setting's dotted key, or a result's name; the header in summary.csv.
        label: as short as the other columns' labels allow.
        is_setting: else it is a result.
        hint: what it is, with its unit.
        cells: one for each run.
    """

    key: str
    label: str
    is_setting: bool
    hint: str
    cells: list[Cell]

    @property
    def numeric(self) -> bool:
        """Whether its cells are numbers, as far as there are any."""
        known = [cell for cell in self.cells if cell is not None]
        return bool(known) and all(isinstance(cell, (int, float)) and not isinstance(cell, bool) for cell in known)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a set of runs comes to.

    Attributes:
        metric: by which the runs are judged.
        results: its final value for each run; None where there is none, or the run did not complete.
        groups: runs that differ in nothing but the seed, by index, where there are several of at least one kind.
        grouped_by: the settings that are the same in each group.
    """

    runs: list[RunRecord]
    metric: str
    columns: list[Column]
    results: list[float | None]
    groups: list[list[int]]
    grouped_by: list[str]

    @property
    def sign(self) -> int:
        """1 where less is better, else −1."""
        return 1 if less_is_better(self.metric) else -1

    @property
    def best(self) -> int | None:
        """The index of the best completed run."""
        judged = [(self.sign * result, i) for i, result in enumerate(self.results) if result is not None]
        return min(judged)[1] if judged else None

    def column(self, key: str) -> Column | None:
        return next((column for column in self.columns if column.key == key), None)

    def named(self, group: Sequence[int]) -> str:
        """What sets a group apart from the others."""
        told = [c for c in self.columns if c.key in self.grouped_by and not _alike(c, self.groups)]
        parts = [f"{c.label}={'–' if c.cells[group[0]] is None else c.cells[group[0]]}" for c in told]
        return ", ".join(parts) or "all runs"

    def over_seeds(self) -> list[Interval]:
        """For each group the mean result and its confidence interval."""
        return [interval(list(self._by_seed(group).values())) for group in self.groups]

    def against(self, baseline: int) -> list[Interval | None]:
        """For each group its result minus that of the group ``baseline``, paired by seed."""
        theirs = self._by_seed(self.groups[baseline])
        return [paired(self._by_seed(group), theirs) for group in self.groups]

    def _by_seed(self, group: Sequence[int]) -> dict[Hashable, float]:
        # Of several runs of one seed the newest counts: they are in order of time.
        return {self.runs[i].seed: result for i in group if (result := self.results[i]) is not None}

    def front(self, other: str, *, more_is_better: bool) -> list[bool]:
        """Which runs are not beaten in both the result and the column ``other``."""
        column = self.column(other)
        cells = column.cells if column else [None] * len(self.runs)
        sign = -1 if more_is_better else 1
        points: list[tuple[float, float] | None] = [
            (self.sign * result, sign * float(cell)) if result is not None and isinstance(cell, (int, float)) else None
            for result, cell in zip(self.results, cells, strict=True)
        ]
        return pareto(points)

    def csv(self) -> str:
        """``summary.csv``: a line for each run, full precision, empty where nothing is known."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["run", "folder", "status", *(column.key for column in self.columns), "error"])
        for i, run in enumerate(self.runs):
            error = f"{run.error['type']}: {run.error['message']}" if run.error else ""
            cells = ["" if column.cells[i] is None else column.cells[i] for column in self.columns]
            writer.writerow([run.name, run.folder, run.status, *cells, error])
        return text.getvalue()


_OF_A_SESSION = ("seed", "run.commit", "run.torch")  # no part of what is being compared, unless nothing else differs


def summarise(runs: Sequence[RunRecord], metric: str | None = None) -> Summary:
    """The summary of ``runs``.

    Args:
        metric: by which to judge them; None: what most of them are judged by (``evaluation.metric``).
    """
    runs = list(runs)
    if metric is None:
        named = Counter(str(run.settings.get("evaluation.metric", "val/loss")) for run in runs)
        metric = named.most_common(1)[0][0] if named else "val/loss"
    settings = _settings(runs)
    results = _results(runs, metric)
    judged: list[float | None] = [
        float(value) if run.status == "completed" and (value := run.final_metrics.get(metric)) is not None else None
        for run in runs
    ]
    grouped_by = [column for column in settings if column.key not in _OF_A_SESSION]
    groups = _groups(grouped_by, judged)
    if any(len({runs[i].seed for i in group}) < len(group) for group in groups):  # then it is code that is compared
        grouped_by = [column for column in settings if column.key != "seed"]
        groups = _groups(grouped_by, judged)
    several = any(len({runs[i].seed for i in group}) > 1 for group in groups)
    return Summary(
        runs=runs,
        metric=metric,
        columns=settings + results,
        results=judged,
        groups=groups if several else [],
        grouped_by=[column.key for column in grouped_by],
    )


def _alike(column: Column, groups: Sequence[Sequence[int]]) -> bool:
    """Whether no two groups differ in it."""
    return len({to_json(sorted({to_json(column.cells[i]) for i in group})) for group in groups}) == 1


def _groups(settings: Sequence[Column], results: Sequence[float | None]) -> list[list[int]]:
    """Runs with a result, grouped by ``settings``."""
    groups: dict[str, list[int]] = {}
    for i, result in enumerate(results):
        if result is not None:
            alike = [column.cells[i] for column in settings]
            groups.setdefault(to_json(alike), []).append(i)
    return list(groups.values())


def _settings(runs: list[RunRecord]) -> list[Column]:
    varying = differing(runs)
    seeds = [run.seed for run in runs]
    if "seed" in varying:  # null where it was to be drawn; run.json has the one that was
        varying["seed"] = seeds
    varying |= _environment(runs)
    labels = _short(list(varying))
    return [
        Column(
            key=key.removesuffix("._target_"),
            label=labels[key],
            is_setting=True,
            hint=key,
            cells=[_cell(key, value) for value in values],
        )
        for key, values in sorted(varying.items(), key=lambda item: _place(*item))
    ]


def _place(key: str, values: list[Any]) -> tuple[bool, bool, bool]:
    """Settings first, the seed, then those in which a few runs are exceptions, and what is no setting at all."""
    _, usual = Counter(to_json(value) for value in values).most_common(1)[0]
    return key.startswith("run."), len(values) - usual <= 0.15 * len(values), key == "seed"


def _environment(runs: list[RunRecord]) -> dict[str, list[Any]]:
    """Code, data and machine, where they differ: results of such runs compare with care."""
    told: dict[str, Callable[[RunRecord], str | None]] = {
        "run.commit": lambda run: _commit(run.part("code")),
        "run.data": lambda run: str(run.record["data_fingerprint"])[:8] if "data_fingerprint" in run.record else None,
        "run.torch": lambda run: run.part("versions").get("torch"),
    }
    found = {key: [read(run) for run in runs] for key, read in told.items()}
    return {key: values for key, values in found.items() if len({value for value in values if value is not None}) > 1}


def _commit(code: dict[str, Any]) -> str | None:
    if not code.get("commit"):
        return None
    return str(code["commit"])[:8] + ("+" if code.get("dirty") else "")


def _cell(key: str, value: Any) -> Cell:
    if key.endswith("._target_") and isinstance(value, str):
        return value.rpartition(".")[2]
    return value if value is None or isinstance(value, (str, int, float, bool)) else to_json(value)


def _short(keys: list[str]) -> dict[str, str]:
    """Each key's last parts, as many as tell it from the others."""
    names = {key: key.removesuffix("._target_").split(".") for key in keys}
    short = {}
    for key, parts in names.items():
        for n in range(1, len(parts) + 1):
            tail = parts[-n:]
            if all(other[-n:] != tail for theirs, other in names.items() if theirs != key):
                break
        short[key] = ".".join(parts[-n:])
    return short


def _results(runs: list[RunRecord], metric: str) -> list[Column]:
    """The deciding metric first, then what else every run has to show."""
    sign = 1 if less_is_better(metric) else -1

    def best(run: RunRecord) -> float | None:
        finite = [value for _, value in run.series(metric) if value is not None]
        return sign * min(sign * value for value in finite) if finite else None

    def final(name: str) -> Callable[[RunRecord], Cell]:
        return lambda run: run.final_metrics.get(name)

    def memory(run: RunRecord) -> Cell:
        known = run.final_metrics.get("memory/peak_gib")
        return known if known is not None else run.part("memory").get("measured_peak_gib")

    told: dict[str, tuple[str, Callable[[RunRecord], Cell]]] = {
        metric: ("when the run ended", final(metric)),
        f"best {metric}": ("the best of the whole run", best),
        "val/loss": ("nats per target token, when the run ended", final("val/loss")),
        "val/exact_match": ("share of right answers, when the run ended", final("val/exact_match")),
        "train/loss": ("nats per target token, the last that was logged", final("train/loss")),
        **{name: ("found by ftlab evaluate at its latest step", _evaluated(name)) for name in _evaluations(runs)},
        "perf/tokens_per_s": ("real tokens per second, over the whole run", final("perf/tokens_per_s")),
        "memory/peak_gib": ("GiB, of the first rank", memory),
        "steps": ("optimizer steps done", lambda run: run.step),
        "tokens": ("real tokens trained on", lambda run: run.part("progress").get("tokens")),
        "duration_s": ("seconds from start to end", lambda run: run.record.get("duration_s")),
    }
    columns = [
        Column(key=key, label=key, is_setting=False, hint=hint, cells=[read(run) for run in runs])
        for key, (hint, read) in told.items()
    ]
    return [column for column in columns if any(cell is not None for cell in column.cells)]


def _evaluations(runs: list[RunRecord]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for one in run.evaluations for name in _scores(one)))


def _scores(evaluation: dict[str, Any]) -> dict[str, float]:
    """``loss`` on ``alpaca`` as ``alpaca: loss``."""
    scores = evaluation.get("scores")
    named = scores.items() if isinstance(scores, dict) else ()
    return {f"{evaluation.get('on')}: {key}": value for key, value in named if isinstance(value, (int, float))}


def _evaluated(name: str) -> Callable[[RunRecord], Cell]:
    def read(run: RunRecord) -> Cell:
        return next((_scores(one)[name] for one in reversed(run.evaluations_by_step) if name in _scores(one)), None)

    return read
