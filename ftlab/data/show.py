"""Samples as people can look at them: every token's text, coloured by whether it is trained."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ftlab.data.batch import Sample
from ftlab.data.gate import Finding
from ftlab.data.samples import Samples
from ftlab.data.tokenizers import Tokenizer

N_EXAMPLES = 3
_MAX_TOKENS = 2_000  # of a shown sample: a page stays a page


class Shown(NamedTuple):
    """A run of tokens as text; ``control`` for one control token, by its name; ``weight`` is how much each counts."""

    text: str
    weight: float
    control: bool

    @property
    def trained(self) -> bool:
        return self.weight > 0

    @property
    def note(self) -> str:
        """The weight, where there is anything to say of it."""
        return "" if self.weight in (0, 1) else f"×{self.weight:.4g}"


def shown(sample: Sample, tokenizer: Tokenizer) -> Iterator[Shown]:
    """The text of a sample in runs of trained and untrained."""
    names = {i: name for name, i in tokenizer.specials.items()}
    tokens, trained = sample.tokens[:_MAX_TOKENS].tolist(), sample.trained[:_MAX_TOKENS]
    start, before = 0, ""
    for i, token in enumerate(tokens):
        if token in names:
            yield Shown(names[token], float(trained[i]), True)
            start = i + 1
        elif i + 1 == len(tokens) or tokens[i + 1] in names or trained[i + 1] != trained[start]:
            # All of it so far, less what was shown: alone, a run would lose the space that it begins with.
            text = tokenizer.decode(tokens[: i + 1])
            yield Shown(text[len(before) :], float(trained[start]), False)
            start, before = i + 1, text
    if len(sample.tokens) > _MAX_TOKENS:
        yield Shown(f" … {len(sample.tokens) - _MAX_TOKENS} tokens more", 0.0, True)


def examples(samples: Samples, n: int) -> list[Sample]:
    """``n`` samples from the shortest to the longest, evenly."""
    by_length = np.argsort(samples.lengths, kind="stable")
    places = np.linspace(0, len(by_length) - 1, min(n, len(by_length))).round().astype(int)
    return [samples.sample(int(by_length[place])) for place in places]


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #20262d }
h2 { font-size: 1.1rem; margin-top: 2rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f7f9; padding: 1rem; border-radius: 6px }
.t { background: #c9f0d2 } .c { color: #8a4baf; font-weight: 600 } .stops { color: #b3261e; font-weight: 600 }
td { padding: 0 1rem 0 0; vertical-align: top }
"""


def as_html(
    title: str, report: dict[str, Any], findings: Sequence[Finding], samples: Sequence[Sample], tokenizer: Tokenizer
) -> str:
    """One page: what was found, the numbers, and samples coloured by what is trained."""
    lines = [
        f'<li class="{"stops" if finding.stops else ""}">{html.escape(f"{finding.kind}: {finding}")}</li>'
        for finding in findings
    ] or ["<li>nothing</li>"]
    numbers = [
        f"<tr><td>{name}</td><td>{part['rows']:,} rows</td><td>{part['samples']:,} samples</td>"
        f"<td>{part['tokens']:,} tokens, {part['target_tokens']:,} of them trained</td>"
        f"<td>longest {part['max_row_tokens']:,}</td></tr>"
        for name in ("train", "validation")
        if (part := report.get(name))
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><table>{''.join(numbers)}</table>"
        f"<h2>Found</h2><ul>{''.join(lines)}</ul>"
        '<p><span class="t">trained</span> · not trained · <span class="c">control token</span></p>'
        f"{''.join(sample_html(sample, tokenizer) for sample in samples)}</html>"
    )


def _noted(run: Shown) -> str:
    return f"<sub>{run.note}</sub>" if run.note else ""


def sample_html(sample: Sample, tokenizer: Tokenizer) -> str:
    """One sample as a block of a page."""
    runs = (
        f'<span class="{"t" * run.trained} {"c" * run.control}">{html.escape(run.text)}{_noted(run)}</span>'
        for run in shown(sample, tokenizer)
    )
    n_trained = int(np.count_nonzero(sample.trained))
    head = f"row {sample.sample_id}: {len(sample.tokens)} tokens, {n_trained} trained"
    return f"<h2>{head}</h2><pre>{''.join(runs)}</pre>"
