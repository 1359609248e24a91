"""Precision: the dtype weights are kept in, the dtype arithmetic runs in, and loss scaling where it needs it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ftlab.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One option of ``conf/precision``.

    Args:
        param_dtype: of weights, gradients and optimizer state.
        compute_dtype: of matrix products and activations; where it differs from
            ``param_dtype`` the forward runs under autocast (mixed precision).
        loss_scaling: scale the loss so that float16 gradients do not underflow; a step
            whose scaled gradients overflow is skipped and the scale halved.
    """

    param_dtype: str
    compute_dtype: str
    loss_scaling: bool

    def __post_init__(self) -> None:
        for key in ("param_dtype", "compute_dtype"):
            if getattr(self, key) not in _DTYPES:
                raise ConfigError(
                    f"precision.{key}",
                    f"{getattr(self, key)!r} is not one of {', '.join(_DTYPES)}",
                    fix=f"precision.{key}=float32",
                )

    @property
    def weights(self) -> torch.dtype:
        """Dtype the model's parameters are allocated in."""
        return _DTYPES[self.param_dtype]

    @property
    def compute(self) -> torch.dtype:
        """Dtype of matrix products and activations."""
        return _DTYPES[self.compute_dtype]

    def require(self, device: torch.device) -> None:
        """Refuse a device that cannot compute like this.

        Raises:
            ConfigError: with the reason.
        """

    def prepare(self, model: nn.Module) -> None:
        """Change a fresh model, on the meta device, where arithmetic takes other layers; names stay."""

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """Context for every forward; does nothing where weights already have the compute dtype."""
        return torch.autocast(device.type, dtype=self.compute, enabled=self.compute != self.weights)

    def grad_scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """The run's loss scaler; without ``loss_scaling`` a pass-through, so that the loop needs no branch."""
        return torch.amp.GradScaler(device.type, enabled=self.loss_scaling)


@dataclass(frozen=True, kw_only=True)
class Float8(Precision):
    """``precision=fp8``: matrix products of blocks in float8 with a scale for each tensor (torchao).

    Weights, gradients and optimizer stay what they are; embedding, head and attention compute in ``compute_dtype``.

    Args:
        emulated: rounds like float8 and computes in float32, on any device: to try it, not to be fast.
    """

    emulated: bool

    def require(self, device: torch.device) -> None:
        if not self.emulated and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
            problem = f"fp8 needs a GPU with float8 matrix products (compute capability 8.9, Hopper), this is {name}"
            raise ConfigError("precision", problem, "precision=bf16_mixed")
        _torchao()  # after what no package can mend

    def prepare(self, model: nn.Module) -> None:
        float8 = _torchao()

        def wants_it(module: nn.Module, name: str) -> bool:  # noqa: ARG001 -- torchao's signature
            # The hardware takes multiples of 16.
            return isinstance(module, nn.Linear) and all(size % 16 == 0 for size in module.weight.shape)

        # A gradient's product sums over tokens, which are as many as there are: torchao pads them to a multiple of 16.
        settings = float8.Float8LinearConfig(emulate=self.emulated, pad_inner_dim=True)
        for block in model.get_submodule("blocks").children():
            float8.convert_to_float8_training(block, config=settings, module_filter_fn=wants_it)


def _torchao() -> Any:
    try:
        import torchao.float8
    except ImportError:
        raise ConfigError("precision", "fp8 needs torchao", 'pip install "ftlab[gpu]"') from None
    return torchao.float8
