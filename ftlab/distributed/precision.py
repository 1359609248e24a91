"""Precision: the dtype weights are kept in, the dtype arithmetic runs in, and loss scaling where it needs it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

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

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """Context for every forward; does nothing where weights already have the compute dtype."""
        return torch.autocast(device.type, dtype=self.compute, enabled=self.compute != self.weights)

    def grad_scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """The run's loss scaler; without ``loss_scaling`` a pass-through, so that the loop needs no branch."""
        return torch.amp.GradScaler(device.type, enabled=self.loss_scaling)
