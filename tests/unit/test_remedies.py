"""The smallest change that makes a run fit, found by few forecasts, is the one that forecasting every change finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab import forecast as forecasting
from ftlab.config.build import Config, build
from ftlab.config.check import compose_config
from ftlab.forecast import Setting, forecast, with_values
from ftlab.models.config import ModelConfig
from ftlab.remedies import changes, changes_of_numbers, smallest_change
from ftlab.training.rehearse import PROCESS_BYTES, Rehearsal

DEEP = ("model.n_layers=6", "model.dim=64", "model.n_heads=2", "model.ffn_hidden_dim=96", "model.vocab_size=500")
RUNS = {
    "micro-batches": ("trainer.batch_size=48",),
    "gradients kept": ("trainer.batch_size=4", "trainer.max_grad_norm=null"),
    "recomputed already": ("trainer.batch_size=6", "parallelism.activation_checkpointing=full"),
    "offloaded": ("trainer.batch_size=32", "parallelism=fsdp", "parallelism.cpu_offload=true"),
    "global batch": ("trainer.batch_size=8", "trainer.global_batch_size=32", "precision=bf16_mixed"),
}
Forecast = Callable[[Config, ModelConfig, Setting], Rehearsal]


def setting(*, on_cuda: bool) -> Setting:
    return Setting(
        longest=96,
        longest_validation=80,
        rows=500,
        validation_rows=100,
        n_ranks=1,
        n_local_ranks=1,
        on_cuda=on_cuda,
    )


def first_that_fits(
    config: Config, model: ModelConfig, where: Setting, available: float, forecast: Forecast = forecast
) -> list[str] | None:
    for change in (*changes(config, where), *changes_of_numbers(config, where)):
        ranks = replace(where, n_ranks=change.n_ranks, n_local_ranks=min(change.n_ranks, 8))
        if forecast(change.config, model, ranks).peak <= available:
            return change.overrides
    return None


@cache
def composed(*more: str) -> Config:
    return compose_config([*DEEP, *more])


def made_up(config: Config, model: ModelConfig, where: Setting) -> Rehearsal:
    """Like a forecast, and quick: a block keeps 100 bytes of weights in float32, and 80 of a row's activations."""
    size = 2 if config["precision"]["param_dtype"] == "bfloat16" else 4
    moments = {"torch.optim.AdamW": 2 * size, "torch.optim.SGD": 0}.get(config["optimizer"]["_target_"], 2)
    shares = where.n_ranks if config["parallelism"]["_target_"].endswith("FSDP") else 1
    n_weights = (40 + 25 * model.n_layers) / shares
    per_block = {"none": 80, "selective": 40, "full": 10, "offload": 1}[
        config["parallelism"]["activation_checkpointing"]
    ]
    rows = config["trainer"]["batch_size"]
    gradients = 30 if config["trainer"]["optimizer_in_backward"] else size * n_weights
    first = size * n_weights + gradients + rows * (90 + per_block * model.n_layers) + 70
    later = first + moments * n_weights
    evaluated = 0 if where.longest_validation is None else config["evaluation"]["batch_size"] * 60
    stretches = (
        ("first forward and backward", round(first)),
        ("later steps", round(later)),
        ("evaluation", round((size + moments) * n_weights + evaluated)),
    )
    if where.on_cuda and config["parallelism"].get("cpu_offload"):
        on_host = (size + moments) * n_weights + gradients
        stretches = tuple((phase, round(n_bytes - on_host)) for phase, n_bytes in stretches)
    live = max(n_bytes for _, n_bytes in stretches)
    return Rehearsal(
        stretches=stretches,
        weights=round(size * n_weights),
        gradients=round(gradients),
        optimizer_state=round(moments * n_weights),
        peak=live if where.on_cuda else round(1.07 * live) + 11,
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 24, 7, 512]),
    n_layers=st.sampled_from([2, 6, 40]),
    share=st.floats(0.01, 1.0),
    on_cuda=st.booleans(),
    recomputed=st.sampled_from(["none", "selective", "full"]),
    max_grad_norm=st.sampled_from([None, 1.0]),
    offloaded=st.booleans(),
)
def test_it_is_the_first_change_that_fits(rows, n_layers, share, on_cuda, recomputed, max_grad_norm, offloaded):
    where = setting(on_cuda=on_cuda)
    config = with_values(
        composed(*(("parallelism=fsdp", "parallelism.cpu_offload=true") if offloaded and on_cuda else ())),
        trainer={"batch_size": rows, "max_grad_norm": max_grad_norm},
        evaluation={"batch_size": 1},
        parallelism={"activation_checkpointing": recomputed},
    )
    model = build(config["model"]).replace(n_layers=n_layers)
    whole = 0

    def counting(config: Config, of: ModelConfig, where: Setting) -> Rehearsal:
        nonlocal whole
        whole += of == model
        return made_up(config, of, where)

    needed = made_up(config, model, where)
    available = share * needed.peak
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(forecasting, "_rehearsed", counting)
        found = smallest_change(needed, config, model, where, available)
    assert (found.overrides if found else None) == first_that_fits(config, model, where, available, made_up)
    if n_layers == 40:
        assert whole <= 4, "only what may fit is forecast with all its blocks"


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.9, 0.6, 0.4, 0.1])
@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("run", RUNS)
def test_it_is_the_first_whose_forecast_fits(run, on_cuda, share):
    where, config = setting(on_cuda=on_cuda), compose_config([*DEEP, *RUNS[run]])
    model = build(config["model"])
    needed = forecast(config, model, where)
    constant = 0 if on_cuda else PROCESS_BYTES
    available = int(constant + share * (needed.peak - constant))
    found = smallest_change(needed, config, model, where, available)
    assert (found.overrides if found else None) == first_that_fits(config, model, where, available)


def test_where_validation_needs_most_it_is_made_smaller_first():
    where = setting(on_cuda=True)
    config = compose_config([*DEEP, "model.n_layers=1", "trainer.batch_size=2", "evaluation.batch_size=64"])
    model = build(config["model"])
    needed = forecast(config, model, where)
    found = smallest_change(needed, config, model, where, needed.phases["evaluation"] - 1)
    assert found.overrides == ["evaluation.batch_size=2"]
