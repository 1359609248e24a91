"""AdamW and SGD for weights in bfloat16, rounded stochastically, and with moments in 16 or 8 bits.

All arithmetic is float32, on pieces that fit a core's cache. Of sharded parameters each rank updates its rows, to the
same bits as one process would: nothing here depends on how the rows are divided.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ftlab.optim import eight_bit
from ftlab.optim.rounding import high, low, more_bits, random_bits, round_stochastically, wrapped

PIECE = 2**16  # elements updated at once on a CPU: their float32 working copies fit the second cache

Moments = dict[str, Tensor]


class RowWise(torch.optim.Optimizer):
    """What both share: each parameter is updated by itself, piece by piece, unless ``found_inf`` says not to.

    ``found_inf`` is the flag that torch's fused optimizers take: on the device, so that nobody waits for it.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]):
        super().__init__(params, defaults | {"fused": True})
        # Rounding differs by it. Known here, since a step may be shown a part of the groups.
        parameters: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        self._number = {p: number for number, p in enumerate(parameters)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None, "gradients are there already"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_of(parameter, group)

    def _step_of(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state.update(self.new_moments(parameter, group))
        found_inf = getattr(self, "found_inf", None)
        bad = torch.zeros((), device=parameter.device) if found_inf is None else found_inf.to(parameter.device)
        state["step"] += 1 - bad
        weights, first_element = _rows(parameter)
        if not weights.numel():
            return  # 8 ranks share a matrix of 4 rows
        assert parameter.grad is not None
        gradients = _rows(parameter.grad)[0]
        moments = {name: _rows(value)[0] for name, value in state.items() if name != "step"}
        # On a GPU one kernel for all of it.
        update: Callable[..., None] = _compiled(self.update_rows) if weights.is_cuda else self.update_rows
        rows_at_once = len(weights) if weights.is_cuda else max(1, PIECE // weights.shape[1])
        settings = {key: value for key, value in group.items() if key in self.settings}
        # As tensors: what is compiled holds for every value of them.
        scalar = partial(torch.full, (), device=weights.device)
        lr, number = scalar(group["lr"]), scalar(self._number[parameter], dtype=torch.int32)
        starts = range(0, len(weights), rows_at_once)
        # Where the step is only rehearsed, any piece takes the memory that the first does: 7B have 100,000 of them.
        for start in starts[:1] if is_fake(weights) else starts:
            rows = slice(start, start + rows_at_once)
            update(
                weights[rows],
                gradients[rows],
                {name: value[rows] for name, value in moments.items()},
                lr,
                state["step"],
                bad,
                number,
                scalar(wrapped(first_element + start * weights.shape[1]), dtype=torch.int32),
                **settings,
            )

    settings: tuple[str, ...] = ()

    def new_moments(self, parameter: Tensor, group: dict[str, Any]) -> Moments:
        """What is kept of ``parameter`` from step to step; its rows are divided as the parameter's."""
        raise NotImplementedError

    @staticmethod
    def update_rows(
        weights: Tensor,
        gradients: Tensor,
        moments: Moments,
        lr: Tensor,
        step: Tensor,
        bad: Tensor,
        number: Tensor,
        first_element: Tensor,
        **settings: Any,
    ) -> None:
        """Update ``weights`` (R, C) and their ``moments`` in place, or leave them where ``bad``."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: Any) -> None:
        """torch's would cast codes and scales to the dtype of the weights."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = list(self._number)
        for number, entry in state_dict["state"].items():
            self.state[parameters[number]] = {
                name: value.to(parameters[number].device) if name == "step" else value for name, value in entry.items()
            }


class AdamW(RowWise):
    """AdamW (Loshchilov & Hutter 2019) whose moments take 16 bits (of bfloat16 weights) or 8.

    Weights and 16-bit moments are rounded stochastically where they are bfloat16; 8-bit moments to the nearest code,
    and vectors' moments are never in 8 bits.

    Args:
        moment_bits: 8, or 16: the weights' dtype.
    """

    settings = ("betas", "eps", "weight_decay", "moment_bits")

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, moment_bits: int
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "moment_bits": moment_bits}
        super().__init__(params, defaults)

    def new_moments(self, parameter: Tensor, group: dict[str, Any]) -> Moments:
        names = ("exp_avg", "exp_avg_sq")
        if group["moment_bits"] != 8 or parameter.ndim < 2:
            return {name: torch.zeros_like(parameter) for name in names}
        # Code 0 is -1 of a signed scale, but the scales are 0 too.
        codes = {name: torch.zeros_like(parameter, dtype=torch.uint8) for name in names}
        return codes | {f"{name}_scale": _new_rows(parameter, eight_bit.n_blocks) for name in names}

    @staticmethod
    def update_rows(
        weights: Tensor,
        gradients: Tensor,
        moments: Moments,
        lr: Tensor,
        step: Tensor,
        bad: Tensor,
        number: Tensor,
        first_element: Tensor,
        **settings: Any,
    ) -> None:
        (beta1, beta2), eps = settings["betas"], settings["eps"]
        gradient, weight = gradients.float(), weights.float()
        first = _decoded(moments, "exp_avg", signed=True).lerp(gradient, 1 - beta1)
        second = _decoded(moments, "exp_avg_sq", signed=False).lerp(gradient.square(), 1 - beta2)
        size = (second / (1 - beta2**step)).sqrt_().add_(eps)
        weight = weight * (1 - lr * settings["weight_decay"]) - lr / (1 - beta1**step) * first / size
        bits = random_bits(number, step, first_element, weights.shape)
        _keep(weights, weight, low(bits), bad)
        _encode(moments, "exp_avg", first, high(bits), bad, signed=True)
        _encode(moments, "exp_avg_sq", second, low(more_bits(bits)), bad, signed=False)


class SGD(RowWise):
    """Stochastic gradient descent, with or without momentum; of bfloat16 weights all is rounded stochastically."""

    settings = ("momentum", "nesterov", "weight_decay")

    def __init__(self, params: Any, *, lr: float, momentum: float, nesterov: bool, weight_decay: float):
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def new_moments(self, parameter: Tensor, group: dict[str, Any]) -> Moments:
        return {"momentum_buffer": torch.zeros_like(parameter)} if group["momentum"] else {}

    @staticmethod
    def update_rows(
        weights: Tensor,
        gradients: Tensor,
        moments: Moments,
        lr: Tensor,
        step: Tensor,
        bad: Tensor,
        number: Tensor,
        first_element: Tensor,
        **settings: Any,
    ) -> None:
        weight = weights.float()
        change = gradients.float() + settings["weight_decay"] * weight
        bits = random_bits(number, step, first_element, weights.shape)
        if moments:
            momentum = settings["momentum"]
            kept = moments["momentum_buffer"].float() * momentum + change
            _keep(moments["momentum_buffer"], kept, high(bits), bad)
            change = change + momentum * kept if settings["nesterov"] else kept
        _keep(weights, weight - lr * change, low(bits), bad)


# ------------------------------------------------------------------------------------------------- rows and pieces


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of ``tensor``, as a matrix that shares its memory, and their first element's place."""
    first = 0
    if isinstance(tensor, DTensor):
        _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        first = offsets[0] * (tensor.numel() // tensor.shape[0])
        tensor = tensor.to_local()
    return tensor.view(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.view(1, -1), first


def _new_rows(parameter: Tensor, n_columns: Callable[[int], int]) -> Tensor:
    """Zeros in float32, (R, n_columns of a row's length), whose rows are divided as those of ``parameter``."""
    columns = n_columns(parameter.numel() // parameter.shape[0])
    if not isinstance(parameter, DTensor):
        return torch.zeros(parameter.shape[0], columns, device=parameter.device)
    local = torch.zeros(parameter.to_local().shape[0], columns, device=parameter.device)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=torch.Size((parameter.shape[0], columns)),
        stride=(columns, 1),
    )


def _decoded(moments: Moments, name: str, *, signed: bool) -> Tensor:
    if (scales := moments.get(f"{name}_scale")) is None:
        return moments[name].float()
    return eight_bit.decode(moments[name], scales, signed=signed)


def _encode(moments: Moments, name: str, values: Tensor, bits: Tensor, bad: Tensor, *, signed: bool) -> None:
    if (scales := moments.get(f"{name}_scale")) is None:
        _keep(moments[name], values, bits, bad)
        return
    codes, new_scales = eight_bit.encode(values, signed=signed)
    moments[name].copy_(torch.where(bad > 0, moments[name], codes))
    scales.copy_(torch.where(bad > 0, scales, new_scales))


def _keep(destination: Tensor, values: Tensor, bits: Tensor, bad: Tensor) -> None:
    """Write float32 ``values`` in the dtype of ``destination``, unless ``bad``."""
    rounded = round_stochastically(values, bits) if destination.dtype == torch.bfloat16 else values
    destination.copy_(torch.where(bad > 0, destination, rounded.to(destination.dtype)))


@cache
def _compiled(update_rows: Any) -> Callable[..., None]:
    return torch.compile(update_rows, dynamic=False)
