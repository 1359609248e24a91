"""Several sets as one, in given shares."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ftlab.data.base import TrainingData
from ftlab.data.batch import Sample
from ftlab.data.dataset import Dataset
from ftlab.data.encode import Encoder
from ftlab.data.gate import Finding, allowing, on_both_sides, stop_or_tell, stopping
from ftlab.data.order import shares
from ftlab.data.samples import JoinedSamples, MixedRows, Packs, Samples
from ftlab.errors import ConfigError, DataError


@dataclass(kw_only=True, eq=False)
class Mixture(TrainingData):
    """Rows of several sets, each with options of its own (``dataset=mixture``).

    An epoch takes ``epoch_rows`` rows (packs, where sets are packed) in the proportion of the weights. Each set is gone
    through once before any of its rows comes again, and goes on in an epoch where the one before left it.

    Attributes:
        sets: name to set; every one an option of ``dataset``, without what arrives at run time.
        weights: name to weight, any positive numbers.
        epoch_rows: rows of an epoch; null: as many as all sets have together.
        shuffle, group_by_length: those of the sets themselves are not looked at.

    Raises:
        ConfigError, DataError: whatever is wrong with one of the sets, naming it.
    """

    sets: Mapping[str, Callable[..., Dataset]]
    weights: Mapping[str, float]
    epoch_rows: int | None

    def __post_init__(self) -> None:
        self._check_values()
        self.datasets: dict[str, Dataset] = {}
        first_id = 0
        for name, make in self.sets.items():
            with _told_as(name):
                made = make(
                    tokenizer=self.tokenizer,
                    seq_len=self.seq_len,
                    seed=self.seed,
                    cache_dir=self.cache_dir,
                    progress=self.progress,
                    inspecting=self.inspecting,
                    first_id=first_id,
                )
            self.datasets[name] = made
            first_id += made.n_rows
        sets = list(self.datasets.values())
        packed = [isinstance(made.train, Packs) for made in sets]
        if any(packed) and not all(packed):
            problem = "some sets are packed and some are not: rows of both kinds cannot be in one batch"
            raise ConfigError("dataset.sets", problem, "the same packing for all of them")
        rows: list[Samples | Packs] = []
        for name, made in self.datasets.items():
            if not isinstance(made.train, (Samples, Packs)):
                problem = "true, but a mixture has to know how many rows each of its sets has"
                raise ConfigError(f"dataset.sets.{name}.streaming", problem, f"dataset.sets.{name}.streaming=false")
            rows.append(made.train)
        counts = self._counts(sum(map(len, rows)) if self.epoch_rows is None else self.epoch_rows)
        self.train = MixedRows(rows, counts)
        held_out = [made.validation for made in sets if isinstance(made.validation, Samples)]
        self.validation = JoinedSamples(held_out) if held_out else None
        across = list(self._across_sets())
        self.findings = [finding for made in sets for finding in made.findings] + [finding for _, finding in across]
        self.report = self._report(self.train, counts)
        if not self.inspecting:
            for name, finding in across:
                with _told_as(name):
                    self.report["warnings"] += stop_or_tell([finding], self.datasets[name].allow)

    def stopped_by(self) -> dict[str, list[Finding]]:
        """An override for each set in which something was found."""
        stopped: dict[str, list[Finding]] = {}
        for name, made in self.datasets.items():
            across = [finding for of, finding in self._across_sets() if of == name]
            if found := stopping([*made.findings, *across], made.allow):
                stopped[f"dataset.sets.{name}.allow={allowing(found, made.allow)}"] = found
        return stopped

    def encoder(self) -> Encoder:
        """That of the first set."""
        return next(iter(self.datasets.values())).encoder()

    def examples(self) -> list[Sample]:
        """A training sample of every set."""
        return [sample for made in self.datasets.values() for sample in made.examples(1)]

    def histograms(self) -> dict[str, dict[str, list[float]]]:
        """How long the rows of every set are."""
        return {name: made.histograms()["train"] for name, made in self.datasets.items()}

    def _counts(self, total: int) -> list[int]:
        """How many of an epoch's ``total`` rows each set has.

        Raises:
            ConfigError: for a set that would have none, in this epoch or any other.
        """
        weights = [self.weights[name] for name in self.datasets]
        counts: list[int] = shares(weights, total).tolist()
        for name, weight, count in zip(self.datasets, weights, counts, strict=True):
            if not count:
                needed = math.ceil(sum(weights) / weight)
                problem = f"{weight:g} of {sum(weights):g} is no row of an epoch's {total}: {name} would never be used"
                fix = f"dataset.epoch_rows={needed}, or a larger dataset.weights.{name}"
                raise ConfigError(f"dataset.weights.{name}", problem, fix)
        return counts

    def _across_sets(self) -> Iterator[tuple[str, Finding]]:
        """Rows that one set, whose name comes first, validates with and another trains on."""
        for name, made in self.datasets.items():
            for other, others in self.datasets.items():
                for validation in made.parts[1:] if other != name else ():
                    part = replace(validation, name=f"{name}'s validation (and {other}'s train)")
                    yield from ((name, finding) for finding in on_both_sides(others.parts[0], part))

    def _report(self, train: MixedRows, counts: list[int]) -> dict[str, Any]:
        reports = {name: made.report for name, made in self.datasets.items()}
        fingerprints = [train.fingerprint(), self.validation.fingerprint() if self.validation else ""]
        return {
            "source": self.source,
            "rows": sum(report["rows"] for report in reports.values()),
            "seq_len": self.seq_len,
            "sets": {
                name: {
                    "weight": self.weights[name],
                    "share": round(count / sum(counts), 6),
                    "rows_per_epoch": count,
                    "passes_per_epoch": round(count / len(rows), 6),
                    "report": reports[name],
                }
                for name, rows, count in zip(self.datasets, train.sets, counts, strict=True)
            },
            "train": _sum_of([report["train"] for report in reports.values()]),
            "validation": _sum_of([report["validation"] for report in reports.values() if report["validation"]]),
            "warnings": [f"{name}: {warning}" for name, report in reports.items() for warning in report["warnings"]],
            "fingerprints": {
                "tokenizer": self.tokenizer.fingerprint,
                "dataset": hashlib.sha256(" ".join(fingerprints).encode()).hexdigest(),
            },
        }

    def _check_values(self) -> None:
        if not self.sets:
            raise ConfigError("dataset.sets", "a mixture needs at least one set", "dataset=instruct")
        if set(self.weights) != set(self.sets):
            problem = f"has {', '.join(self.weights) or 'nothing'}, but the sets are {', '.join(self.sets)}"
            raise ConfigError("dataset.weights", problem, "a weight for each set")
        for name, weight in self.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
                raise ConfigError(f"dataset.weights.{name}", f"{weight!r} is not a number above 0", "1.0")


@contextmanager
def _told_as(name: str) -> Iterator[None]:
    """What is wrong with a set alone, told with the keys that it has as ``name`` in a mixture."""
    try:
        yield
    except ConfigError as error:
        fix = error.fix and _with_its_keys(error.fix, name)
        raise ConfigError(_with_its_keys(error.key, name), error.problem, fix) from error
    except DataError as error:
        raise DataError(_with_its_keys(str(error), name)) from error


def _with_its_keys(text: str, name: str) -> str:
    # Where a message begins, and in what it offers to type: elsewhere it may be about a file of that name.
    text = re.sub(r"(?m)(^|try: |, or )dataset=", rf"\1dataset@dataset.sets.{name}=", text)
    return re.sub(r"(?m)(^|try: |, or )dataset(?=[.:])", rf"\1dataset.sets.{name}", text)


def _sum_of(reports: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The numbers of several parts together."""
    if not reports:
        return None
    added = ("rows", "samples", "tokens", "target_tokens")
    return {name: sum(report[name] for report in reports) for name in added} | {
        "max_row_tokens": max(report["max_row_tokens"] for report in reports)
    }
