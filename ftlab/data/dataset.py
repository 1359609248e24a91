"""A set for fine-tuning: rows → conversations → tokens and mask → arrays on disk → samples, or packs of them.

``Dataset`` is what a ``conf/dataset`` option describes. The steps are in rooms of their own: ``sources`` (rows),
``fields`` and ``formats`` (conversations), ``templates`` and ``encode`` (tokens and mask), ``tokenise`` (many of them),
``arrays``, ``store`` and ``cache`` (on disk), ``split``, ``packing``, ``samples`` (what training and evaluation are
handed), ``gate`` and ``report`` (what is said about it).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ftlab.data.arrays import WINDOWS, Choice, code_of, tokenised
from ftlab.data.base import TrainingData
from ftlab.data.batch import Sample
from ftlab.data.cache import cached, clear_leased, key_of
from ftlab.data.encode import Encoder
from ftlab.data.files import FILE_FORMATS
from ftlab.data.formats import Format
from ftlab.data.gate import (
    Finding,
    Part,
    allowing,
    find,
    refuse_absent,
    refuse_empty,
    refuse_too_long,
    repeated,
    stop_or_tell,
    stopping,
)
from ftlab.data.packing import Packing, Plan, plan_packs
from ftlab.data.problems import Problem, check_allowed
from ftlab.data.report import report_on, told_of_length
from ftlab.data.samples import Packs, Samples
from ftlab.data.shorten import TooLong
from ftlab.data.show import N_EXAMPLES, examples
from ftlab.data.sources import Source, open_source
from ftlab.data.split import draw_validation
from ftlab.data.store import Store
from ftlab.data.stream import Stream, while_wanted
from ftlab.data.templates import Template
from ftlab.data.tokenise import Recipe
from ftlab.data.windows import WindowOfRows, WindowReader
from ftlab.errors import ConfigError, DataError

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Dataset(TrainingData):
    """Rows of one source as training and validation samples (``dataset`` in the config).

    Attributes:
        source, data_files, split, subset, revision: where the rows are, see ``sources.open_source``.
        val_split, val_data_files: where validation rows of the source's own are, with a null ``val_fraction``.
        column_map: the set's column for each field of the format; null for one that it does not have.
        filter: an expression over a row's columns; rows for which it is false are left out. Null keeps all.
        format: makes conversations of rows.
        template: renders conversations.
        train_on_input: whether everything is trained; false: what the assistant says, and the token that ends it.
        packing: whether several samples share a row of ``seq_len`` tokens, see ``packing.plan_packs``.
        val_fraction: share of the rows held out, equal rows staying on one side; 0 for none; null for the
            validation rows that the source brings.
        max_samples: use only the first so many rows of the source; null for all.
        too_long: what becomes of a row of more than ``seq_len`` tokens, see ``shorten.shorten``.
        allow: kinds of problems (``problems.BLOCKING``) that do not stop the run.
        streaming: read the source in windows of ``window_rows`` rows, of which two are on the disk at a time, see
            ``stream``. Report and findings are then those of the first window, and ``val_fraction`` is a share of it.
        first_id: what row 0 counts as; the sets of a mixture count on from each other.

    Raises:
        ConfigError, DataError: whatever is wrong with values or rows.
    """

    data_files: str | Sequence[str] | None
    split: str
    subset: str | None
    revision: str | None
    val_split: str | None
    val_data_files: str | Sequence[str] | None
    column_map: Mapping[str, str | None]
    filter: str | None
    format: Format
    template: Template
    train_on_input: bool
    packing: Packing
    val_fraction: float | None
    max_samples: int | None
    too_long: TooLong
    allow: Sequence[str]
    streaming: bool
    window_rows: int
    first_id: int = 0

    def __post_init__(self) -> None:
        self._check_values()
        train, own_validation = self._open_sources()
        windows = self._windows(train) if self.streaming else None
        stores = {"train": self._tokenised(train if windows is None else windows().window(0), "train")}
        if own_validation is not None:
            stores["validation"] = self._tokenised(own_validation, "validation")
        for store in stores.values():
            if store.facts["rows_read"] == 0:
                raise DataError(f"dataset: source={self.source} data_files={self.data_files} holds no rows")
        refuse_absent(stores["train"])
        self.parts = self._parts(stores)
        self.n_rows = stores["train"].facts["rows_read"]
        samples = {part.name: self._samples(part) for part in self.parts}
        for part in self.parts:
            refuse_empty(part, self.seq_len)
        self.validation = samples.get("validation")
        rows = samples["train"] if self.packing == "none" else self._packed(samples["train"])
        self.train = rows if windows is None else self._stream(windows, rows)
        problems = [problem for store in stores.values() for problem in _problems(store)]
        self.findings = find(self.parts, problems, self.tokenizer)
        self.report = self._report(stores, rows)
        if not self.inspecting:
            self.report["warnings"] += stop_or_tell(self.findings, self.allow)

    # ---- rows to arrays

    def _open_sources(self) -> tuple[Source, Source | None]:
        """The source of the training rows, and the one of validation rows that the set brings."""
        common: dict[str, Any] = {
            **{"source": self.source, "subset": self.subset, "revision": self.revision, "cache_dir": self.cache_dir},
            "streaming": self.streaming,
        }
        train = open_source(**common, split=self.split, data_files=self.data_files)
        if self.val_fraction is not None:
            return train, None
        of_files = self.source in FILE_FORMATS
        val_split = "validation" if self.source == "tiny" else self.val_split
        if self.val_data_files is None and (of_files or val_split is None):
            unread = f" (dataset.val_split={val_split} is for a set on the Hub)" if val_split is not None else ""
            raise ConfigError(
                "dataset.val_fraction",
                f"is null, but dataset.source={self.source} brings no validation rows of its own{unread}",
                "dataset.val_fraction=0.05" + (", or dataset.val_data_files=/path/to/rows.json" if of_files else ""),
            )
        key = "dataset.val_data_files"
        return train, open_source(**common, split=val_split, data_files=self.val_data_files, files_key=key)

    def _tokenised(self, source: Source, name: str) -> Store:
        """The arrays of a source's rows, from the cache or made now."""
        recipe = Recipe(
            format=self.format,
            column_map=self.column_map,
            template=self.template,
            tokenizer=self.tokenizer,
            train_on_input=self.train_on_input,
            seq_len=self.seq_len,
            too_long=self.too_long,
        )
        choice = Choice(
            expression=self.filter,
            limit=self.max_samples if name == "train" else None,
            allow=tuple(sorted(self.allow)),
            inspecting=self.inspecting,
        )
        window = source.number if isinstance(source, WindowOfRows) else None
        progress = while_wanted if window else self.progress
        label = f"tokenising {name}"
        return tokenised(source, recipe, choice, self.cache_dir, progress, label, stays=window is None)

    # ---- a stream

    def _windows(self, source: Source) -> Callable[[], WindowReader]:
        """What makes readers of ``source``, each of which begins with its first row."""
        if hasattr(self.format, "regroup"):
            problem = f"true, but {type(self.format).__name__} puts rows together, which a window's end would part"
            raise ConfigError("dataset.streaming", problem, "dataset.streaming=false")
        clear_leased(self.cache_dir, WINDOWS)
        fingerprint = source.fingerprint()
        return lambda: WindowReader(source, fingerprint, self.window_rows, self.max_samples)

    def _stream(self, windows: Callable[[], WindowReader], first: Samples | Packs) -> Stream:
        of_all = [windows().fingerprint, self.window_rows, self.max_samples, self.filter, self.seq_len, self.too_long]
        whole = [first.fingerprint(), *of_all, self.packing, code_of()]
        return Stream(windows, lambda window: self._tokenised(window, "train"), self._window_rows_of, key_of(whole))

    def _window_rows_of(self, store: Store, number: int) -> Samples | Packs:
        """What is trained of a window: all of it but rows that are validated with."""
        others = [part for part in self.parts if part.name == "validation"]
        kept = np.ones(len(store.row_numbers), dtype=bool)
        if self.val_fraction is not None:
            for part in others:
                kept = ~np.isin(store.row_digests, part.store.row_digests[part.rows])
        part = Part("train", store, kept)
        samples = self._samples(part)
        if number:  # what was found in the first is in the report
            findings = find([part, *others], _problems(store), self.tokenizer)
            of_window = [one for one in findings if one.part != "validation" or one.kind == "in_train_and_validation"]
            for warning in stop_or_tell(of_window, self.allow):
                log.info("data: rows from %d on: %s", number * self.window_rows, warning)
        if self.packing == "none":
            return samples
        return Packs(samples, plan_packs(samples.lengths, self.seq_len, self.packing), self.seq_len)

    # ---- arrays to samples

    def _parts(self, stores: Mapping[str, Store]) -> list[Part]:
        """Which rows are trained on, and which validated with."""
        store = stores["train"]
        everything = np.ones(len(store.row_numbers), dtype=bool)
        if not everything.any():
            counts = [f"{store.facts['filtered_rows']} by dataset.filter"]
            counts += [f"{n} as {kind}" for kind, n in _counted(store.facts["problems"]).items()]
            raise DataError(f"dataset: none of {store.facts['rows_read']} rows is left: {', '.join(counts)} left out")
        if "validation" in stores:
            own = stores["validation"]
            return [
                Part("train", store, everything),
                Part("validation", own, np.ones(len(own.row_numbers), dtype=bool)),
            ]
        assert self.val_fraction is not None
        held_out = draw_validation(store.row_digests, self.val_fraction, self.seed)
        parts = [Part("train", store, ~held_out), Part("validation", store, held_out)]
        return [part for part in parts if part.rows.any()]

    def _samples(self, part: Part) -> Samples:
        """Raises: DataError: for a row that is too long under ``too_long=error``."""
        if self.too_long == "error" and not self.inspecting:
            refuse_too_long(part, self.seq_len)
        picks = np.flatnonzero(part.rows[part.store.sample_rows])
        return Samples(part.store, picks, self.tokenizer, self.first_id)

    def _packed(self, samples: Samples) -> Packs:
        def write(folder: Path) -> None:
            plan = plan_packs(samples.lengths, self.seq_len, self.packing)
            np.save(folder / "documents.npy", plan.documents)
            np.save(folder / "ends.npy", plan.ends)

        key = key_of([samples.fingerprint(), self.seq_len, self.packing, code_of()])
        folder = cached(self.cache_dir, "packs", key, write)
        plan = Plan(*(np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in Plan._fields))
        return Packs(samples, plan, self.seq_len)

    # ---- what is said about it

    def stopped_by(self) -> dict[str, list[Finding]]:
        """At most one override."""
        found = stopping(self.findings, self.allow)
        return {f"dataset.allow={allowing(found, self.allow)}": found} if found else {}

    def encoder(self) -> Encoder:
        """What made the samples' tokens."""
        return Encoder(tokenizer=self.tokenizer, template=self.template, train_on_input=self.train_on_input)

    def examples(self, n: int = N_EXAMPLES) -> list[Sample]:
        """Some of the training samples, from the shortest to the longest."""
        return examples(self._samples(self.parts[0]), n)

    def histograms(self) -> dict[str, dict[str, list[float]]]:
        """How long the rows are, before anything is cut."""
        parts = {name: self.report[name] for name in ("train", "validation") if self.report[name]}
        return {name: part["row_tokens_histogram"] for name, part in parts.items()}

    def _report(self, stores: Mapping[str, Store], rows: Samples | Packs) -> dict[str, Any]:
        """Args: rows: what is trained; of a stream, its first window."""
        store = stores["train"]
        parts = {part.name: report_on(part) for part in self.parts}
        digests = store.row_digests
        fingerprints = "".join(part.fingerprint() for part in (self.train, self.validation) if part is not None)
        packing: dict[str, Any] = {"kind": self.packing}
        if isinstance(rows, Packs):
            packing |= {"packs": len(rows), "efficiency": round(rows.efficiency(), 6)}
        return {
            **{"source": self.source, "data_files": self.data_files, "split": self.split, "revision": self.revision},
            "streaming": {"window_rows": self.window_rows} if self.streaming else None,
            "rows": store.facts["rows_read"],
            "filtered_rows": store.facts["filtered_rows"],
            "left_out_rows": _counted(store.facts["problems"]),
            "duplicate_rows": len(repeated(digests)),
            **{"seq_len": self.seq_len, "too_long": self.too_long, "train_on_input": self.train_on_input},
            "packing": packing,
            "findings": [vars(finding) | {"rows": finding.rows[:100]} for finding in self.findings],
            "train": parts["train"],
            "validation": parts.get("validation"),
            "warnings": [
                line for name, part in parts.items() for line in told_of_length(name, part, self.too_long, self.seq_len)
            ],
            "fingerprints": {
                "rows": hashlib.sha256(digests.tobytes()).hexdigest(),
                "tokenizer": self.tokenizer.fingerprint,
                "dataset": hashlib.sha256(fingerprints.encode()).hexdigest(),
            },
        }

    def _check_values(self) -> None:
        for name, kind in (("too_long", TooLong), ("packing", Packing)):
            if getattr(self, name) not in get_args(kind):
                choices = get_args(kind)
                problem = f"{getattr(self, name)!r} is none of {', '.join(choices)}"
                raise ConfigError(f"dataset.{name}", problem, f"dataset.{name}={choices[0]}")
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            raise ConfigError(
                "dataset.val_fraction", f"{self.val_fraction} is not in [0, 1)", "dataset.val_fraction=0.05"
            )
        if self.max_samples is not None and self.max_samples < 1:
            raise ConfigError(
                "dataset.max_samples",
                f"{self.max_samples} is less than 1; null uses all",
                "dataset.max_samples=null",
            )
        if self.seq_len < 2:
            raise ConfigError("seq_len", f"{self.seq_len} leaves no token to predict another from", "seq_len=512")
        check_allowed(self.allow)


@dataclass(kw_only=True, eq=False)
class AlpacaDataset(Dataset):
    """The Alpaca set in one of its two editions.

    Attributes:
        use_clean: the cleaned edition instead of Stanford's. In the config ``dataset.source`` follows from it
            unless it is given, as for a local copy; the report then still says which edition that was.
    """

    use_clean: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        self.report["use_clean"] = self.use_clean


def _problems(store: Store) -> list[Problem]:
    """Why rows were left out."""
    return [Problem(**problem) for problem in store.facts["problems"]]


def _counted(problems: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    kinds = [problem["kind"] for problem in problems]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
