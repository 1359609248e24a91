"""Measure the data path: rows in a file to packed samples, against the tokenizer's own bare speed.

    python benchmarks/data.py [--rows N] [--tokenizer tokenizer.model] [--file rows.json]

Without a file, Alpaca-like rows are generated. Every figure is of a process of its own, so that peak memory is that
of the data path alone. Prints a table, and one JSON line with the same numbers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import sentencepiece
from rich.console import Console
from rich.table import Table

from ftlab.config.build import build
from ftlab.config.check import compose_config
from ftlab.data.cores import n_cores, use_cores
from ftlab.data.dataset import Dataset
from ftlab.data.templates import AlpacaTemplate
from ftlab.data.tokenizers.sentencepiece_model import TINY_MODEL

_WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "by",
    "on",
    "not",
    "his",
    "but",
]


def generated(n: int) -> Iterator[dict[str, str]]:
    """Short rows of Alpaca's form."""
    rng = random.Random(0)
    for i in range(n):
        words = rng.choices(_WORDS, k=rng.randint(12, 60))
        yield {"instruction": f"{i}: {' '.join(words[:12])}", "input": "", "output": " ".join(words[12:])}


def measure_ours(file: Path, tokenizer: str, cache: Path, cores: int) -> dict[str, float]:
    """Seconds and peak memory of rows to packs; the second of two starts finds all of it in the cache."""
    use_cores(cores)
    config = compose_config(
        [
            *("dataset=instruct", "dataset.source=jsonl", f"dataset.data_files={file}", "dataset.packing=best_fit"),
            *("dataset.val_fraction=0", "tokenizer=sentencepiece", f"tokenizer.path={tokenizer}", "seq_len=2048"),
        ]
    )
    opened = build(config["tokenizer"])
    started, cpu_started = time.perf_counter(), time.process_time()
    data: Dataset = build(
        config["dataset"],
        tokenizer=opened,
        **{"seq_len": config["seq_len"], "seed": 0, "cache_dir": cache, "progress": None},
    )
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "tokens": data.report["train"]["tokens"],
        "efficiency": data.report["packing"]["efficiency"],
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def measure_bare(file: Path, tokenizer: str) -> dict[str, float]:
    """CPU seconds of the tokenizer's own encoding of the rendered texts, on one core, texts ready in memory."""
    use_cores(1)
    with file.open(encoding="utf-8") as lines:
        template, rows = AlpacaTemplate(), [json.loads(line) for line in islice(lines, 50_000)]
    texts = [template.render(row["instruction"], row["input"]) + row["output"] for row in rows]
    bare = sentencepiece.SentencePieceProcessor(model_file=str(TINY_MODEL if tokenizer == "tiny" else tokenizer))
    started, cpu_started = time.perf_counter(), time.process_time()
    ids = bare.encode(texts, add_bos=True, add_eos=True, num_threads=1)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": sum(map(len, ids))}


def alone(work: Any, *args: Any) -> dict[str, float]:
    """``work(*args)`` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(_undaemonised, (work, *args))


def _undaemonised(work: Any, *args: Any) -> dict[str, float]:
    multiprocessing.current_process().daemon = False  # else it may not start workers
    return work(*args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000, help="rows to generate, or to repeat --file to")
    parser.add_argument("--tokenizer", default="tiny", help="a SentencePiece model (default: the packaged one)")
    parser.add_argument("--file", type=Path, help="a JSON array of Alpaca rows")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ftlab-benchmark-"))
    try:
        file = folder / "rows.jsonl"
        rows = json.loads(arguments.file.read_text(encoding="utf-8")) if arguments.file else None
        with file.open("w", encoding="utf-8") as out:
            for i, row in enumerate(generated(arguments.rows) if rows is None else range(arguments.rows)):
                out.write(json.dumps(row if rows is None else rows[i % len(rows)], ensure_ascii=False) + "\n")
        where = (file, arguments.tokenizer)
        bare = alone(measure_bare, *where)
        figures: dict[str, Any] = {
            "rows": arguments.rows,
            "bare_tokens_per_s": bare["tokens"] / bare["seconds"],
            "bare_tokens_per_cpu_s": bare["tokens"] / bare["cpu_seconds"],
        }
        for cores in sorted({1, n_cores()}):
            cache = folder / f"cache{cores}"
            cold, warm = (alone(measure_ours, *where, cache, cores) for _ in range(2))
            figures |= {
                f"tokens_per_s_{cores}_cores": cold["tokens"] / cold["seconds"],
                f"second_start_s_{cores}_cores": warm["seconds"],
                f"peak_gib_{cores}_cores": cold["peak_gib"],
            }
            if cores == 1:  # CPU time: on a busy machine wall time tells of its neighbours
                per_cpu_s = cold["tokens"] / cold["cpu_seconds"]
                figures |= {"tokens_per_cpu_s": per_cpu_s, "of_bare": per_cpu_s / figures["bare_tokens_per_cpu_s"]}
        figures |= {"tokens": cold["tokens"], "packing_efficiency": cold["efficiency"]}
    finally:
        shutil.rmtree(folder)
    table = Table(title="data path", show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:,.0f}" if value > 1000 else f"{value:.3f}")
    Console().print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
