"""One decision on all ranks: clipping off, bad numbers, overflow of scaled gradients, degrees that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ftlab.distributed.env import WorkerEnv
from ftlab.distributed.fsdp import HSDP
from ftlab.errors import ConfigError, NonFiniteError
from ftlab.training.loop import fit
from tests.distributed.harness import RanksFailed, run_ranks
from tests.distributed.strategies import in_group, precision_of, strategy, train, whole_weights
from tests.distributed.test_strategies import ALONE
from tests.loop.conftest import Rows, build_hand_run

ROWS = Rows(16)


def sgd_with_momentum(*arguments: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(*arguments, momentum=0.9, **options)


@pytest.mark.parametrize(
    ("name", "options"), [("momentum", {"optimizer": sgd_with_momentum}), ("not fused", {"fused": False})]
)
def test_other_kinds_of_sgd_step_on_shards_too(name: str, options: dict[str, Any]) -> None:
    options = options | {"max_steps": 5, "max_grad_norm": None}
    expected = train(ALONE, strategy("single"), ROWS, batch_size=8, **options)
    first, _ = run_ranks(2, train_fsdp, options)
    assert first.losses == pytest.approx(expected.losses, rel=1e-5)
    assert first.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)


def train_fsdp(worker: WorkerEnv, options: dict[str, Any]) -> Any:
    return train(worker, strategy("fsdp"), ROWS, batch_size=4, **options)


def step_with_a_bad_gradient(worker: WorkerEnv, precision: str, kinds: list[str]) -> dict[str, Any]:
    """Rank 1 alone computes an infinite gradient in the second of three steps."""
    results = {}
    for kind in kinds:
        parallel = strategy(kind).start(in_group(worker, kind), precision_of(precision))
        trial = build_hand_run(
            ROWS, parallel=parallel, precision=precision, batch_size=4, max_steps=3, log_every_steps=100
        )
        model, guard = trial.run.state.model, trial.run.state.guard
        calls, seen = iter(range(100)), []

        def spoil(gradient: torch.Tensor, calls: Any = calls, parallel: Any = parallel) -> torch.Tensor:
            return gradient * float("inf") if next(calls) == 1 and parallel.rank == 1 else gradient

        def spoil_gradient_of_output(module: Any, _: Any, output: torch.Tensor, spoil: Any = spoil) -> None:
            output.register_hook(spoil)

        model.blocks[0].register_forward_hook(spoil_gradient_of_output)
        update = guard.update

        def watch(*arguments: Any, model: Any = model, seen: Any = seen, update: Any = update) -> None:
            before = whole_weights(model)
            update(*arguments)
            after = whole_weights(model)
            seen.append(all(torch.equal(before[name], after[name]) for name in before))

        guard.update = watch  # type: ignore[method-assign]
        try:
            fit(trial.run)
            error = None
        except NonFiniteError as caught:
            error = str(caught).splitlines()[0]
        results[kind] = {"unchanged": seen, "error": error, "scale": trial.run.state.scaler.get_scale()}
        parallel.close()
    return results


def test_a_bad_gradient_of_one_rank_changes_no_weight_on_any_and_all_say_so() -> None:
    ranks = run_ranks(2, step_with_a_bad_gradient, "fp32", ["ddp", "fsdp"])
    for kind in ("ddp", "fsdp"):
        assert ranks[0][kind]["unchanged"][:2] == [False, True], kind
        for rank in ranks:
            assert rank[kind]["error"].startswith("step 2: "), kind


def test_scaled_gradients_that_overflow_on_one_rank_skip_the_step_on_all() -> None:
    ranks = run_ranks(2, step_with_a_bad_gradient, "fp16_mixed", ["ddp", "fsdp"])
    for kind in ("ddp", "fsdp"):
        assert ranks[0][kind]["unchanged"] == [False, True, False], kind
        for rank in ranks:
            assert rank[kind] == rank[kind] | {"error": None, "scale": 2.0**15}, kind


@pytest.mark.parametrize(
    ("degrees", "shape"), [((2, 4), (2, 4)), ((None, 2), (4, 2)), ((8, None), (8, 1)), ((None, None), (2, 4))]
)
def test_degrees_left_out_follow_from_the_ranks(degrees: tuple[int | None, int | None], shape: tuple[int, int]) -> None:
    assert hsdp(*degrees).mesh_shape(n_ranks=8, n_local_ranks=4) == shape


@pytest.mark.parametrize("degrees", [(2, 2), (3, None), (None, 3), (1, 16)])
def test_degrees_that_do_not_make_the_ranks_are_refused_with_all_numbers(
    degrees: tuple[int | None, int | None],
) -> None:
    with pytest.raises(ConfigError, match=r"= \d+ × \d+ = \d+, but there are 8 ranks"):
        hsdp(*degrees).mesh_shape(n_ranks=8, n_local_ranks=4)


def hsdp(replicate: int | None, shard: int | None) -> HSDP:
    found = strategy("hsdp", replicate_degree=replicate, shard_degree=shard)
    assert isinstance(found, HSDP)
    return found


def fail_on_rank_1(worker: WorkerEnv) -> None:
    parallel = strategy("ddp").start(worker, precision_of("fp32"))
    if worker.rank == 1:
        raise ValueError("a planted failure")
    parallel.barrier()


def test_the_harness_shows_the_traceback_of_the_rank_that_failed() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)rank 1:.*ValueError: a planted failure"):
        run_ranks(2, fail_on_rank_1)
