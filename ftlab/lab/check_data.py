"""Look at the data of a configuration before anything is trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ftlab.assembly.data import beside_checkpoint, read_data
from ftlab.config.build import build
from ftlab.config.check import compose_config
from ftlab.data.base import TrainingData
from ftlab.data.cache import cache_folder, size_of
from ftlab.data.samples import Packs
from ftlab.data.tokenizers import Tokenizer
from ftlab.lab.terminal import print_sample
from ftlab.models.hub import resolve_checkpoint
from ftlab.plots import draw_lengths


def check_data(overrides: Sequence[str], folder: Path, extra_dir: Path | None = None) -> int:
    """Tell what is wrong with the data, show some samples, and write both into ``folder`` with a plot of lengths.

    Args:
        extra_dir: a further folder to search for options.

    Returns:
        The exit code: 0, or 2 when something would stop a run.

    Raises:
        ConfigError, DataError: for data that cannot be read at all.
    """
    config = compose_config(overrides, extra_dir=extra_dir)
    named = config["model"]["checkpoint"]
    # Only where the tokenizer is looked for beside the model's weights are these needed.
    checkpoint = resolve_checkpoint(named) if named and config["tokenizer"].get("path") == named else None
    tokenizer: Tokenizer = build(beside_checkpoint(config["tokenizer"], named, checkpoint))
    data = read_data(config, tokenizer, inspecting=True)
    console = Console(highlight=False)
    stopping = _tell(console, data)
    for sample in data.examples():
        print_sample(console, sample, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data_check.html").write_text(data.page(), encoding="utf-8")
    draw_lengths(data.histograms(), config["seq_len"], folder / "lengths.png")
    cache_dir = cache_folder(config["paths"]["cache_dir"])
    kept = size_of([cache_dir]) / 2**20
    console.print(f"\ncache: {kept:,.0f} MiB of tokenised rows and packs in {cache_dir}", soft_wrap=True)
    console.print(f"written: {folder / 'data_check.html'}, {folder / 'lengths.png'}", soft_wrap=True)
    return 2 if stopping else 0


def _tell(console: Console, data: TrainingData) -> bool:
    """Print what was found; whether any of it stops a run."""
    for name in ("train", "validation"):
        if (part := data.report[name]) is not None:
            weights = part.get("weights")
            counting = f", by weights from {weights[0]:.4g} to {weights[1]:.4g}" if weights else ""
            console.print(
                f"[bold]{name:<11}[/]{part['rows']:,} rows, {part['samples']:,} samples, {part['tokens']:,} tokens, "
                f"{part['target_tokens']:,} of them trained{counting}, longest row {part['max_row_tokens']:,}",
                soft_wrap=True,
            )
    if data.report.get("streaming"):
        console.print(f"a stream: this is its first window, {data.report['rows']:,} rows")
    if isinstance(data.train, Packs):
        console.print(f"[bold]packs      [/]{len(data.train):,}, {data.train.efficiency():.1%} full")
    for name, one in data.report.get("sets", {}).items():
        console.print(f"[bold]{name:<11}[/]{one['share']:.1%} of an epoch, {one['passes_per_epoch']:.2f} times through")
    for warning in data.report["warnings"]:
        console.print(Text(f"- {warning}"), soft_wrap=True)
    stopped_by = data.stopped_by()
    stopping = [finding for findings in stopped_by.values() for finding in findings]
    for finding in data.findings:
        style = "bold red" if finding in stopping else "yellow"
        console.print(Text.assemble((f"{finding.kind}  ", style), str(finding)), soft_wrap=True)
        if finding.example:
            console.print(Text(f"    {finding.example}"), soft_wrap=True)
    if stopping:
        told = Text(f"a run stops here; to run all the same: {' '.join(stopped_by)}", "bold red")
        console.print(told, soft_wrap=True)
    elif not data.findings:
        console.print("nothing wrong was found", style="green")
    return bool(stopping)
