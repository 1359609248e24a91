"""The plan of a run, for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_plan(plan: dict[str, Any]) -> None:
    """Print what `plan.plan` found."""
    console = Console(width=max(Console().width, 110))
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _facts(plan):
        table.add_row(f"[bold]{name}", value)
    console.print(table)
    console.print(_memory(plan["memory"]))
    memory = plan["memory"]
    verdict = (
        f"peak {memory['peak_gib']:.2f} GiB on each rank; available: {memory['available_gib']:.2f} ({memory['device']})"
    )
    if memory["fits"]:
        console.print(f"fits: {verdict}", highlight=False)
        return
    console.print(f"does not fit: {verdict}", style="bold red", highlight=False)
    change = memory["smallest_change"]
    told = " ".join(change) if change else "a smaller model or seq_len; nothing else makes it fit"
    console.print(f"  try: {told}", highlight=False, markup=False, soft_wrap=True)


def _facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    model, batch, run, cost = (plan[name] for name in ("model", "batch", "run", "cost"))
    facts = [
        ("parameters", f"{model['parameters']:,}   (vocabulary {model['vocab_size']:,})"),
        ("weights", model["checkpoint"] or "random"),
        ("FLOPs/token", f"{model['flops_per_token']:.3g}   at {run['longest']:,} tokens a row, forward and backward"),
        (
            "batch",
            f"{batch['batch_size']} × {batch['gradient_accumulation_steps']} accumulated × {batch['ranks']} ranks"
            f" = {batch['global_batch_size']} sequences a step",
        ),
        ("steps", _number(run["steps"], "unknown: --rows N tells, or data at hand")),
        ("samples", _number(run["samples"])),
        ("tokens", _number(run["tokens"], "unknown: --rows N --row-tokens N tell, or data at hand")),
        ("counted on", "the rows themselves" if run["source"] == "data" else "the numbers given"),
    ]
    if cost is not None:
        price = f", {cost['price']:,.2f} in all" if "price" in cost else ""
        hours = (
            f"{cost['hours']:,.2f} h at {cost['tokens_per_s']:,.0f} tokens/s; {cost['device_hours']:,.2f} device-hours"
        )
        facts.append(("time", f"{hours}{price}   (training; evaluation comes on top)"))
    return facts


def _number(value: int | None, unknown: str = "unknown") -> str:
    return unknown if value is None else f"{value:,}"


def _memory(memory: dict[str, Any]) -> Table:
    table = Table(title="GiB live at once on each rank", title_justify="left", pad_edge=False)
    for column in ("phase", "weights", "optimizer state", "gradients, activations, buffers", "in all"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase, total in memory["phases_gib"].items():
        state = 0.0 if phase in ("load", "first forward and backward") else memory["optimizer_state_gib"]
        rest = max(total - memory["weights_gib"] - state, 0.0)
        table.add_row(phase, *(f"{value:.2f}" for value in (memory["weights_gib"], state, rest, total)))
    return table
