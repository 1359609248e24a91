"""What several verbs show on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from ftlab.data.batch import Sample
from ftlab.data.show import shown
from ftlab.data.tokenizers import Tokenizer


def print_sample(console: Console, sample: Sample, tokenizer: Tokenizer) -> None:
    """One sample, whole, with what is trained of it: in colour on a terminal, between marks elsewhere."""
    key = "green is trained" if console.is_terminal else "what is between ⟦ and ⟧ is trained"
    console.print(f"\n[bold]row {sample.sample_id}[/], {len(sample.tokens)} tokens, {key}:")
    text = Text()
    for run in shown(sample, tokenizer):
        style = ("bold " * run.control) + ("green" if run.trained else "dim")
        text.append(run.text if console.is_terminal or not run.trained else f"⟦{run.text}⟧", style)
        text.append(run.note, "dim italic")
    console.print(text, soft_wrap=True)
