"""Validation on many ranks: the loss and the answers of one process, whoever finishes first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ftlab.assembly.model import build_model, random_weights
from ftlab.data.batch import Sample
from ftlab.distributed.base import Strategy
from ftlab.distributed.env import WorkerEnv
from ftlab.losses import CrossEntropy
from ftlab.training.evaluate import EvaluationConfig, Evaluator
from tests.distributed.harness import run_ranks
from tests.distributed.strategies import in_group, precision_of, strategy
from tests.distributed.test_strategies import ALONE
from tests.loop.conftest import MODEL

STRATEGIES = {
    "ddp": strategy("ddp"),
    "fsdp": strategy("fsdp"),
    "fsdp, weights kept": strategy("fsdp", reshard_after_forward=False),
    "hsdp": strategy("hsdp", replicate_degree=2),
    "cpu_offload": strategy("fsdp", cpu_offload=True),
}
EOS = 7


class Questions:
    """Seven rows: not a multiple of the ranks, prompts of several lengths."""

    def __init__(self) -> None:
        random = np.random.default_rng(1)
        self.rows = [random.integers(0, 101, 20).astype(np.int32) for _ in range(7)]

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, i: int) -> Sample:
        return Sample(tokens=self.rows[i], trained=np.arange(20) >= self.prompt_len(i), sample_id=i)

    def prompt_len(self, i: int) -> int:
        return 3 + i % 3

    def prompt_tokens(self, i: int) -> list[int]:
        return self.rows[i][: self.prompt_len(i)].tolist()

    def sample_id(self, i: int) -> int:
        return i

    def answer(self, i: int) -> str:
        return str(self.rows[i][self.prompt_len(i) :].tolist())

    def family(self, i: int) -> str:
        return "odd" if i % 2 else "even"


class Digits:
    pad_id, eos_id = 0, EOS

    def decode(self, ids: list[int]) -> str:
        return str(ids)


def evaluate(worker: WorkerEnv, parallelism: Strategy) -> dict[str, Any]:
    parallel = parallelism.start(worker, precision_of("fp32"))
    model = build_model(MODEL, random_weights(5), precision_of("fp32"), parallel)
    shown: list[dict[str, Any]] = []
    settings = {
        "at_start": True,
        "metric": "val/loss",
        "patience": None,
        "every_steps": None,
        "batch_size": 2,
        "max_batches": None,
        "n_samples": 7,
    }
    evaluator = Evaluator(
        config=EvaluationConfig(**settings, max_new_tokens=12),
        validation=Questions(),  # type: ignore[arg-type]
        tokenizer=Digits(),  # type: ignore[arg-type]
        end_ids=[EOS],
        loss=CrossEntropy(label_smoothing=0.0, z_loss=0.0),
        on_samples=lambda samples, step: shown.extend(samples),
    )
    metrics = evaluator(model, 1, precision_of("fp32"), parallel)
    shards = [p for p in model.parameters() if type(p).__name__ == "DTensor"]
    parallel.close()
    return {"metrics": metrics, "answers": [sample["generated"] for sample in shown], "n_shards": len(shards)}


def evaluate_all(worker: WorkerEnv) -> dict[str, dict[str, Any]]:
    return {name: evaluate(in_group(worker, name), parallelism) for name, parallelism in STRATEGIES.items()}


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_loss_and_answers_are_those_of_one_process(n_ranks: int) -> None:
    expected = evaluate(ALONE, strategy("single"))
    assert len({len(answer) for answer in expected["answers"]}) > 1, "some ranks must have less to do than others"
    for rank in run_ranks(n_ranks, evaluate_all):
        for name, result in rank.items():
            assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-6), name
            assert result["answers"] == expected["answers"], name
            everything = len(list(MODEL.build().parameters()))
            assert result["n_shards"] == (0 if name == "ddp" else everything), f"{name} left weights gathered"
