"""What a set is to the rest of ftlab, be it one or a mixture of several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftlab.data.arrays import Progress
from ftlab.data.batch import Sample
from ftlab.data.encode import Encoder
from ftlab.data.gate import Finding
from ftlab.data.loader import BatchLoader
from ftlab.data.samples import JoinedSamples, MixedRows, Packs, Samples
from ftlab.data.show import as_html
from ftlab.data.stream import Stream
from ftlab.data.tokenizers import Tokenizer


@dataclass(kw_only=True, eq=False)
class TrainingData(ABC):
    """Training and validation samples, and what is known of them.

    Attributes:
        source: what it is called in reports.
        shuffle: whether training draws a new order each epoch.
        group_by_length: whether rows of like length come in the same step, where they are not packed.
        tokenizer, seq_len, seed: given at run time.
        cache_dir: where tokenised rows are kept.
        progress: shows a bar while rows are tokenised; null is silent.
        inspecting: collect all problems instead of stopping at them (``check-data``).
        train, validation: the samples; no validation is null.
        report: counts, token statistics and fingerprints, and ``warnings`` to show to the user.
        findings: what the gate found.
        fingerprint: of all that training and validation see.
    """

    source: str
    shuffle: bool
    group_by_length: bool
    tokenizer: Tokenizer
    seq_len: int
    seed: int
    cache_dir: Path
    progress: Progress | None
    inspecting: bool = False
    train: Samples | Packs | MixedRows | Stream = field(init=False)
    validation: Samples | JoinedSamples | None = field(init=False)
    report: dict[str, Any] = field(init=False)
    findings: list[Finding] = field(init=False)

    @property
    def fingerprint(self) -> str:
        fingerprint: str = self.report["fingerprints"]["dataset"]
        return fingerprint

    @abstractmethod
    def stopped_by(self) -> dict[str, list[Finding]]:
        """The findings that no run begins with, by the override that would allow them."""

    @abstractmethod
    def encoder(self) -> Encoder:
        """What made the samples' tokens."""

    @abstractmethod
    def examples(self) -> list[Sample]:
        """Some of the training samples."""

    @abstractmethod
    def histograms(self) -> dict[str, dict[str, list[float]]]:
        """How long the rows are, before anything is cut."""

    def page(self) -> str:
        """What was found and some samples coloured by what is trained, as HTML."""
        return as_html(f"{self.source}: what is trained", self.report, self.findings, self.examples(), self.tokenizer)

    def loader(
        self,
        *,
        batch_size: int,
        gradient_accumulation_steps: int,
        dp_rank: int,
        dp_size: int,
        share_prefixes: bool = False,
    ) -> BatchLoader:
        """What deals the training rows out to one of ``dp_size`` ranks."""
        return BatchLoader(
            self.train,
            batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            shuffle=self.shuffle,
            seed=self.seed,
            dp_rank=dp_rank,
            dp_size=dp_size,
            pad_id=self.tokenizer.pad_id,
            grouped=self.group_by_length,
            share_prefixes=share_prefixes,
        )

    def longest(self) -> tuple[int, int | None]:
        """Tokens of the longest training row, and of the longest for validation, if there are any."""
        train = self.seq_len if isinstance(self.train, Stream) else int(self.train.lengths.max())
        return train, None if self.validation is None else int(self.validation.lengths.max())
