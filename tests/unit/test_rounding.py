"""Stochastic rounding and 8-bit moments, against counting and against torch's own AdamW."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.optim import eight_bit
from ftlab.optim.low_memory import SGD, AdamW
from ftlab.optim.rounding import high, low, more_bits, random_bits, round_stochastically, wrapped

ADAMW = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def bits(n: int, number: int = 0, step: int = 1, start: int = 0) -> torch.Tensor:
    scalars = (torch.tensor(number, dtype=torch.int32), torch.tensor(float(step)))
    return random_bits(*scalars, torch.tensor(wrapped(start), dtype=torch.int32), torch.Size((n,)))


def test_a_value_is_rounded_up_as_often_as_the_part_that_is_cut_off_says() -> None:
    for share in (0.01, 0.25, 0.5, 0.9):
        value = 1.0 + share * 2.0**-7  # bfloat16 has 1 and 1 + 2**-7
        rounded = round_stochastically(torch.full((2**18,), value), low(bits(2**18)))
        assert set(rounded.unique().tolist()) <= {1.0, 1.0 + 2.0**-7}
        assert rounded.float().mean().item() == pytest.approx(value, abs=4 * 2.0**-7 * 0.5 / 2**9)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100))
@settings(max_examples=200)
def test_the_result_is_one_of_the_two_neighbours(value: float) -> None:
    exact = torch.full((64,), value)
    rounded = round_stochastically(exact, low(bits(64))).float()
    spacing = max(abs(value) * 2.0**-7, 2.0**-133)
    assert ((rounded - exact).abs() < spacing).all()
    assert torch.equal(round_stochastically(rounded, low(bits(64))).float(), rounded), "what fits is left as it is"


def test_bits_depend_on_parameter_step_and_element_only_and_no_bit_prefers_a_value() -> None:
    n = 2**16
    whole = bits(n)
    assert torch.equal(torch.cat([bits(1000), bits(n - 1000, start=1000)]), whole)
    for other in (bits(n, number=1), bits(n, step=2), more_bits(whole), bits(n, start=2**31)):
        ones = torch.tensor([(((whole ^ other) >> i) & 1).float().mean() for i in range(32)])
        assert (ones - 0.5).abs().max() < 5 * 0.5 / n**0.5  # five standard deviations
    correlation = torch.corrcoef(
        torch.stack([low(whole).double(), high(whole).double(), low(more_bits(whole)).double()])
    )
    assert (correlation - torch.eye(3)).abs().max() < 5 / n**0.5


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_keep_values_to_a_level_of_their_decade(signed: bool) -> None:
    values = torch.randn(8, 600, generator=torch.Generator().manual_seed(0)) ** (1 if signed else 2)
    values = values if signed else values.abs()
    codes, scales = eight_bit.encode(values, signed=signed)
    assert (codes.shape, codes.dtype, scales.shape) == ((8, 600), torch.uint8, (8, 3))
    kept = eight_bit.decode(codes, scales, signed=signed)
    largest = torch.repeat_interleave(scales, eight_bit.BLOCK, 1)[:, :600]
    assert ((kept - values).abs() / largest).max() < (0.0071 if signed else 0.0036)  # 64 or 128 levels in [0.1, 1]
    assert (kept - values)[values.abs() < 0.01 * largest].abs().max() < 0.0005 * largest.max()


def test_zero_moments_are_exactly_zero() -> None:
    codes, scales = eight_bit.encode(torch.zeros(2, 300), signed=True)
    assert torch.equal(eight_bit.decode(codes, scales, signed=True), torch.zeros(2, 300))
    assert torch.equal(
        eight_bit.decode(torch.zeros(2, 300, dtype=torch.uint8), torch.zeros(2, 2), signed=True), torch.zeros(2, 300)
    )


def steps(optimizer: type[torch.optim.Optimizer], n: int, dtype: torch.dtype, **options: object) -> list[torch.Tensor]:
    """Weights after ``n`` steps on random gradients: a matrix of more than a piece, one of odd size, a vector."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 400), (7, 3), (50,)]
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    update = optimizer(weights, **options)
    for _ in range(n):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
        update.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (AdamW, torch.optim.AdamW, ADAMW),
        (SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}),
    ],
)
def test_float32_weights_are_torchs(ours: type, theirs: type, options: dict[str, object]) -> None:
    mine = steps(ours, 20, torch.float32, **options, **({"moment_bits": 16} if ours is AdamW else {}))
    for a, b in zip(mine, steps(theirs, 20, torch.float32, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_moments_in_eight_bits_stay_close_to_float32s() -> None:
    exact, coded = (steps(AdamW, 20, torch.float32, **ADAMW, moment_bits=n) for n in (16, 8))
    start = steps(AdamW, 0, torch.float32, **ADAMW, moment_bits=8)
    for a, b, before in zip(exact, coded, start, strict=True):
        assert (a - b).norm() < 0.05 * (a - before).norm()


def test_bfloat16_weights_arrive_where_float32_would_and_torchs_do_not() -> None:
    """200 updates of 1/2000 each, on weights of 1: rounded to the nearest, none of them is seen."""

    def after(optimizer: type[torch.optim.Optimizer], dtype: torch.dtype, **options: float) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
        update = optimizer([weight], lr=1.0, **options)
        for _ in range(200):
            weight.grad = torch.full_like(weight, 1 / 2000)
            update.step()
        return weight.detach().float().mean()

    plain = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    assert after(torch.optim.SGD, torch.float32).item() == pytest.approx(0.9, abs=1e-4)
    assert after(torch.optim.SGD, torch.bfloat16).item() == 1.0
    assert after(SGD, torch.bfloat16, **plain).item() == pytest.approx(0.9, abs=2e-3)


def test_found_inf_leaves_weights_moments_and_step_as_they_were() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 300, dtype=torch.bfloat16))
    update = AdamW([weight], **ADAMW, moment_bits=8)
    weight.grad = torch.ones_like(weight)
    update.step()
    before = [weight.detach().clone(), *(value.clone() for value in update.state[weight].values())]
    weight.grad = torch.full_like(weight, float("nan"))
    update.found_inf = torch.ones(())  # type: ignore[attr-defined]
    update.step()
    assert all(map(torch.equal, before, [weight.detach(), *update.state[weight].values()]))
