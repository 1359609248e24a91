"""Validation: loss on held-out rows, answers to held-out prompts, exact match where answers are verifiable."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ftlab.data.loader import BatchLoader
from ftlab.data.samples import JoinedSamples, Samples
from ftlab.data.tokenizers import Tokenizer
from ftlab.data.weights import ONE
from ftlab.distributed.base import Parallelism
from ftlab.distributed.precision import Precision
from ftlab.errors import ConfigError
from ftlab.losses import Loss
from ftlab.models.auto import AnyModel
from ftlab.training.generate import generate

Sample = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how much to evaluate; ``conf/evaluation/default.yaml`` explains each key."""

    at_start: bool
    metric: str
    patience: int | None
    every_steps: int | None
    batch_size: int
    max_batches: int | None
    n_samples: int
    max_new_tokens: int

    def deciding(self, metrics: Mapping[str, float]) -> float:
        """The value by which checkpoints and patience go.

        Raises:
            ConfigError: when nothing of that name was measured.
        """
        if self.metric not in metrics:
            measured = ", ".join(metrics)
            raise ConfigError("evaluation.metric", f"{self.metric!r} is not measured here; there are {measured}")
        return metrics[self.metric]


@dataclass(kw_only=True)
class Evaluator:
    """Evaluates a model on the run's validation rows.

    Attributes:
        end_ids: tokens that end an answer.
        loss: plain cross-entropy, whatever the training loss adds, so that ``val/loss`` compares across runs.
        on_samples: takes the generated samples and the step they belong to.
        by_number: whether references that end in a number (`final_number`) are verifiable by it; a training run
            would spend more time on answering all of them than on training.
    """

    config: EvaluationConfig
    validation: Samples | JoinedSamples
    tokenizer: Tokenizer
    end_ids: Collection[int]
    loss: Loss
    on_samples: Callable[[list[Sample], int], None]
    by_number: bool = False

    def due(self, step: int, *, ends_epoch: bool, ends_run: bool) -> bool:
        """Whether to evaluate after optimizer step ``step``; 0 is before training."""
        if step == 0:
            return self.config.at_start
        every = self.config.every_steps
        return ends_run or (ends_epoch if every is None else step % every == 0)

    def __call__(self, model: AnyModel, step: int, precision: Precision, parallel: Parallelism) -> dict[str, float]:
        """``val/…`` metrics of ``model``; answers are generated once it has trained at all."""
        model.eval()
        with torch.no_grad(), precision.autocast(parallel.device):
            val_loss = self._mean_loss(model, parallel)
            # exp(700) is about the largest float64: a diverged model still gets a number.
            metrics = {"val/loss": val_loss, "val/perplexity": math.exp(min(val_loss, 700.0))}
            if step > 0:
                samples = self._answer(model, step, parallel)
                metrics |= exact_match(samples)
                self.on_samples(samples[: self.config.n_samples], step)
        model.train()
        return metrics

    def _mean_loss(self, model: AnyModel, parallel: Parallelism) -> float:
        """Mean negative log-likelihood per target token, each as it counts, in nats, over all ranks' rows."""
        loader = BatchLoader(
            self.validation,
            batch_size=self.config.batch_size,
            gradient_accumulation_steps=1,
            shuffle=False,
            seed=0,
            dp_rank=parallel.dp_rank,
            dp_size=parallel.dp_size,
            pad_id=self.tokenizer.pad_id,
        )
        # Sums over a whole validation set in float64: in float32 the order of batches would show.
        total = torch.zeros(2, dtype=torch.float64, device=parallel.device)
        for micro_batches in islice(loader.steps(0), self.config.max_batches):
            for batch in micro_batches:
                batch = batch.to(parallel.device)
                nll: Tensor = model(
                    batch.tokens,
                    batch.targets,
                    self.loss,
                    n_targets=batch.n_targets,
                    weights=batch.weights,
                )
                total[0] += nll
                total[1] += batch.total_weight / ONE
        nll_sum, weight = parallel.sum(total).tolist()
        return nll_sum / weight

    def _answer(self, model: AnyModel, step: int, parallel: Parallelism) -> list[Sample]:
        """Greedy answers: to every validation prompt if answers are verifiable, else to the first ``n_samples``.

        Prompts are dealt to the ranks like rows; every rank returns all answers.
        """
        dataset = self.validation
        verifiable = dataset.family(0) is not None or self._ends_in_number(dataset.answer(0))
        n = len(dataset) if verifiable else min(self.config.n_samples, len(dataset))
        if verifiable and self.config.max_batches is not None:
            n = min(n, self.config.max_batches * self.config.batch_size * parallel.dp_size)
        mine = range(parallel.dp_rank, n, parallel.dp_size)
        answers = generate(
            model,
            [dataset.prompt_tokens(i) for i in mine],
            max_new_tokens=self.config.max_new_tokens,
            end_ids=self.end_ids,
            temperature=0.0,
            top_p=1.0,
            seed=0,
            any_rank=lambda busy: bool(parallel.sum(torch.tensor(int(busy), device=parallel.device))),
        )
        everyone = parallel.gather(dict(zip(mine, answers, strict=True)))
        answer_to = {i: answer for answers in everyone for i, answer in answers.items()}
        return [self._sample(i, answer_to[i], step) for i in range(n)]

    def _sample(self, i: int, answer: list[int], step: int) -> Sample:
        dataset = self.validation
        generated, reference = self.tokenizer.decode(answer).strip(), dataset.answer(i).strip()
        family = dataset.family(i)
        correct: bool | None
        if self._ends_in_number(reference):
            correct = final_number(generated) == final_number(reference)
        else:
            correct = generated == reference if family is not None else None
        return {
            "step": step,
            "sample_id": dataset.sample_id(i),
            "prompt": self.tokenizer.decode(dataset.prompt_tokens(i)),
            "generated": generated,
            "reference": reference,
            "family": family,
            "correct": correct,
        }

    def _ends_in_number(self, reference: str) -> bool:
        return self.by_number and final_number(reference) is not None


def final_number(answer: str) -> str | None:
    """What follows the last ``####`` of an answer as GSM8K's are written, in canonical form: 1,200.0 is 1200."""
    _, mark, tail = answer.rpartition("####")
    found = re.match(r"\s*\$?(-?[\d,]*\.?\d+)", tail) if mark else None
    try:
        return f"{Decimal(found[1].replace(',', '')).normalize():f}" if found else None
    except InvalidOperation:
        return None


def exact_match(samples: list[Sample]) -> dict[str, float]:
    """Share of right answers by task family, ``val/exact_match/<family>``, and over all, ``val/exact_match``."""
    verdicts: defaultdict[str, list[bool]] = defaultdict(list)
    every = [sample["correct"] for sample in samples if sample["correct"] is not None]
    for sample in samples:
        if sample["family"] is not None and sample["correct"] is not None:
            verdicts[f"val/exact_match/{sample['family']}"].append(sample["correct"])
    if not every:
        return {}
    by_family = {name: sum(family) / len(family) for name, family in sorted(verdicts.items())}
    return {"val/exact_match": sum(every) / len(every)} | by_family
