"""Counts and lengths of a part of the rows, for data_report.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftlab.data.shorten import TooLong
from ftlab.data.store import Mark, Store

_BINS = 20


@dataclass(frozen=True)
class Part:
    """Some of a store's rows under a name, ``train`` or ``validation``; ``rows`` is a (n_rows,) bool mask."""

    name: str
    store: Store
    rows: np.ndarray

    def count(self, mark: Mark) -> int:
        """How many of the rows have ``mark``."""
        return int((self.store.row_marks[self.rows] & mark > 0).sum())

    def numbers(self, mark: Mark) -> list[int]:
        """The numbers in the source of the rows that have ``mark``."""
        return self.store.row_numbers[self.rows & (self.store.row_marks & mark > 0)].tolist()


def report_on(part: Part) -> dict[str, Any]:
    """What is known of a part's rows; lengths are those of the rows as they are: seq_len is to be chosen by them."""
    store = part.store
    lengths = store.row_tokens[part.rows]
    samples = part.rows[store.sample_rows]
    counts, edges = np.histogram(lengths, bins=_BINS)
    return {
        "rows": len(lengths),
        "samples": int(samples.sum()),
        "tokens": int((store.ends - store.starts)[samples].sum()),
        "target_tokens": int(store.n_trained[samples].sum(dtype=np.int64)),
        "weights": store.facts.get("weights"),
        "mean_row_tokens": round(float(lengths.mean()), 1) if len(lengths) else 0.0,
        "max_row_tokens": int(lengths.max(initial=0)),
        "row_tokens_histogram": {"edges": edges.round(1).tolist(), "counts": counts.tolist()},
        "too_long_rows": part.count(Mark.TOO_LONG),
        "dropped_too_long_rows": part.count(Mark.DROPPED),
        "dropped_without_answer_rows": part.count(Mark.ANSWERLESS),
        "all_masked_rows": part.count(Mark.ALL_MASKED),
        "empty_output_rows": part.count(Mark.EMPTY),
        "merged_boundary_rows": part.count(Mark.MERGED),
    }


def told_of_length(name: str, report: Mapping[str, Any], too_long: TooLong, seq_len: int) -> list[str]:
    """What ``too_long`` did to the rows of a part, by its report; everything else is the gate's to say."""
    fate = {
        "truncate": "cut, their EOS too",
        "truncate_keep_eos": "cut, the EOS put back where an answer was cut",
        "truncate_left": "cut at their start",
        "split": "split into several samples",
    }.get(too_long, "dropped")
    told = {
        "too_long_rows": f"longer than seq_len={seq_len} tokens (longest {report['max_row_tokens']}): {fate}",
        "dropped_without_answer_rows": "dropped, because cutting left nothing of their answer",
    }
    return [f"{report[key]} of {report['rows']} {name} rows {what}" for key, what in told.items() if report[key]]
