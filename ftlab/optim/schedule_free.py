"""AdamW without a schedule: it trains one point and answers with an average (Defazio et al. 2024, arXiv:2405.15682)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ftlab.errors import ConfigError


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """schedulefree's AdamW: gradients are taken at y, between z, which is stepped, and x, the average of all z.

    The parameters hold y, and z is state. x, which is what was learnt, follows from both; `averaged` puts it into the
    parameters for evaluation and export.

    Attributes:
        counted: settings of a group that its steps change; a checkpoint keeps them.
        average: name of the state that x is reached from y with, and how far it is to go there.
    """

    counted = ("k", "weight_sum", "lr_max")

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        try:
            from schedulefree import AdamWScheduleFree
        except ImportError:
            raise ConfigError("optimizer", "schedule_free needs a library", 'pip install "ftlab[optim]"') from None
        self._library = AdamWScheduleFree(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
        self._library.train()
        super().__init__(self._library.param_groups, {})  # its groups are this optimizer's
        self.average = ("z", 1 - 1 / betas[0])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None, "gradients are there already"
        self._library.param_groups, self._library.state = self.param_groups, self.state
        self._library.step()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the parameters hold x; afterwards y, to the bit. Takes their size in memory, as gradients do."""
        name, weight = self.average
        kept = {p: p.detach().clone() for group in self.param_groups for p in group["params"] if name in self.state[p]}
        with torch.no_grad():
            for parameter in kept:
                parameter.lerp_(self.state[parameter][name], weight)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in kept.items():
                    parameter.copy_(value)
