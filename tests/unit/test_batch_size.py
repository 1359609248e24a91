"""``trainer.batch_size=auto``: the largest divisor that the forecast fits, against trying every size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ftlab.config.build import build
from ftlab.config.check import compose_config
from ftlab.errors import ConfigError, ConfigErrors
from ftlab.forecast import CLEAR_EXCESS, Setting, forecast, with_batch_size
from ftlab.optim.groups import decay_groups
from tests.conftest import ROOT

SMALL = ["model.dim=16", "model.n_heads=2", "model.n_layers=1", "model.ffn_hidden_dim=32", "trainer.batch_size=auto"]
KNOWN: dict[str, Any] = {"longest": 64, "longest_validation": None, "rows": None, "validation_rows": None}


def setting(n_ranks: int = 1) -> Setting:
    return Setting(**KNOWN, n_ranks=n_ranks, n_local_ranks=n_ranks, on_cuda=True)


def test_it_is_the_largest_divisor_whose_forecast_fits() -> None:
    config = compose_config([*SMALL, "trainer.global_batch_size=12"])
    model = build(config["model"]).replace(vocab_size=1000)
    peaks = {
        size: forecast(config | {"trainer": config["trainer"] | {"batch_size": size}}, model, setting()).peak
        for size in (1, 2, 3, 4, 6, 12)
    }
    assert sorted(peaks.values()) == list(peaks.values())
    assert peaks[12] > 1.5 * peaks[4]
    for size, peak in peaks.items():
        found = with_batch_size(config, model, setting(), int(peak * CLEAR_EXCESS) + 1)
        assert found["trainer"]["batch_size"] == size
    assert with_batch_size(config, model, setting(), 1)["trainer"]["batch_size"] == 1, "what helps is said elsewhere"


def test_the_optimizer_in_the_backward_takes_less_than_all_gradients_together() -> None:
    big = [*SMALL[:-1], "model.dim=256", "model.n_layers=8", "trainer.batch_size=1", "trainer.max_grad_norm=null"]
    peaks = []
    for choice in ("false", "true"):
        config = compose_config([*big, f"trainer.optimizer_in_backward={choice}"])
        found = forecast(config, build(config["model"]).replace(vocab_size=1000), setting())
        peaks.append(found)
    plain, within = peaks
    assert within.gradients < plain.gradients / 4
    saved = max(plain.phases.values()) - max(within.phases.values())
    assert saved > 0.4 * (plain.gradients - within.gradients)  # the peak moves to where activations are
    assert (within.weights, within.optimizer_state) == (plain.weights, plain.optimizer_state)


def test_eight_bit_moments_are_forecast_as_a_quarter() -> None:
    state = {}
    for option in ("adamw", "adamw_8bit", "muon"):
        config = compose_config([*SMALL[:-1], "model.dim=256", "model.ffn_hidden_dim=512", f"optimizer={option}"])
        state[option] = forecast(config, build(config["model"]).replace(vocab_size=1000), setting()).optimizer_state
    assert 0.24 < state["adamw_8bit"] / state["adamw"] < 0.28
    assert state["muon"] < state["adamw"]


@pytest.mark.parametrize("option", sorted(file.stem for file in (ROOT / "conf/optimizer").glob("*.yaml")))
def test_what_every_optimizer_keeps_is_forecast_to_the_byte(option: str) -> None:
    if option == "schedule_free":
        pytest.importorskip("schedulefree")
    config = compose_config([*SMALL[:-1], f"optimizer={option}", "scheduler=constant"])
    model_config = build(config["model"]).replace(vocab_size=300)
    found = forecast(config, model_config, setting())
    model = model_config.build()
    model.init_weights(0)
    optimizer = build(config["optimizer"])(decay_groups(model))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert found.optimizer_state == sum(value.nbytes for value in kept)
    assert found.weights == sum(parameter.nbytes for parameter in model.parameters())


def test_a_batch_has_no_more_rows_than_there_are() -> None:
    def peak(batch_size: int, **known: int | None) -> dict[str, int]:
        config = compose_config(
            [*SMALL[:-1], f"trainer.batch_size={batch_size}", f"evaluation.batch_size={batch_size}"]
        )
        model = build(config["model"]).replace(vocab_size=1000)
        return forecast(config, model, replace(setting(n_ranks=2), longest_validation=64, **known)).phases

    assert peak(64, rows=9, validation_rows=7) == peak(5, rows=None, validation_rows=None) | {
        "evaluation": peak(4, rows=None, validation_rows=None)["evaluation"]
    }


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["trainer.batch_size=auto"], "without trainer.global_batch_size"),
        (["trainer.optimizer_in_backward=true"], "max_grad_norm=1.0 clips by the norm of all gradients"),
        (
            ["trainer.optimizer_in_backward=true", "trainer.max_grad_norm=null", "precision=fp16_mixed"],
            "precision.loss_scaling=true looks at all gradients",
        ),
        (
            ["trainer.optimizer_in_backward=true", "trainer.max_grad_norm=null", "parallelism=ddp"],
            "parallelism=ddp exchanges gradients after",
        ),
        (
            ["trainer.optimizer_in_backward=true", "trainer.max_grad_norm=null", "optimizer=muon"],
            "Muon does not update each weight by itself",
        ),
        (["optimizer=adafactor", "parallelism=fsdp"], "knows nothing of shards"),
        (["optimizer=schedule_free"], "averages instead of decaying"),
        (["optimizer=adamw_8bit", "optimizer.moment_bits=12"], "must be 8 or 16"),
        (["trainer.profile_steps=[5,2]"], "5 comes after 2"),
    ],
)
def test_what_cannot_be_together_is_told_with_what_to_do_instead(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigErrors) as errors:
        compose_config(overrides)
    assert told in str(errors.value)
    assert "try: " in str(errors.value)


def test_rows_that_ranks_cannot_share_are_refused() -> None:
    config = compose_config([*SMALL, "trainer.global_batch_size=12"])
    with pytest.raises(ConfigError, match="12 is not a multiple of the 5 data-parallel ranks"):
        with_batch_size(config, None, setting(5), 10**9)
