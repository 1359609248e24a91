"""From gradients to new weights: after the whole backward, or parameter by parameter within it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ftlab.errors import ConfigError

if TYPE_CHECKING:
    from ftlab.training.run import Run


class Update(Protocol):
    """What the loop does with a micro-batch's objective, and with a step's loss."""

    def backward(self, objective: Tensor) -> None:
        """Differentiate ``objective``, a micro-batch's share of the step's loss times the data-parallel ranks."""
        ...

    def apply(self, loss: Tensor, sample_ids: list[int]) -> Tensor:
        """New weights from the step's gradients, which are gone afterwards; the norm they had before clipping.

        Args:
            loss: scalar, of the whole step over all ranks.
            sample_ids: what this rank saw in it.
        """
        ...


def make_update(run: Run) -> Update:
    """The one that ``trainer.optimizer_in_backward`` asks for."""
    return InBackward(run) if run.trainer.optimizer_in_backward else AfterBackward(run)


class AfterBackward:
    """All gradients are collected, clipped together, and given to the optimizer at once."""

    def __init__(self, run: Run):
        self._run = run

    def backward(self, objective: Tensor) -> None:
        self._run.state.scaler.scale(objective).backward()

    def apply(self, loss: Tensor, sample_ids: list[int]) -> Tensor:
        run, state = self._run, self._run.state
        state.scaler.unscale_(state.optimizer)
        # After the last backward only: earlier, gradients are partial and not yet exchanged.
        grad_norm = run.parallel.clip_grad_norm_(state.model, run.trainer.max_grad_norm)
        state.guard.update(state.progress.step + 1, loss, grad_norm, sample_ids)
        state.optimizer.zero_grad(set_to_none=True)
        return grad_norm


class InBackward:
    """Each parameter is updated as soon as its gradient is whole, and the gradient freed: none waits for the others.

    The result is `AfterBackward`'s to the bit, because these optimizers treat every parameter by itself. What needs
    all gradients at once cannot be had: their common norm before the update, sums over micro-batches, loss scaling.

    A bad gradient shows when some parameters are updated already: from it on none is, and `StepGuard.check` ends
    the run before anything is saved.
    """

    def __init__(self, run: Run):
        optimizer = run.state.optimizer
        if not updates_each_by_itself(optimizer):
            raise ConfigError(
                "trainer.optimizer_in_backward",
                f"{type(optimizer).__name__} does not update each parameter by itself",
                "trainer.optimizer_in_backward=false, or optimizer=adamw",
            )
        self._run = run
        self._first = self._good = torch.ones((), dtype=torch.bool, device=run.parallel.device)
        self._norms: dict[Tensor, Tensor] = {}
        self._group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        for parameter in self._group_of:
            parameter.register_post_accumulate_grad_hook(self._take)
        self._begun: set[Tensor] = set()
        run.state.guard.between_steps = False

    def backward(self, objective: Tensor) -> None:
        # Summed over ranks, or one would update what another leaves.
        finite = torch.isfinite(self._run.parallel.sum(objective.detach()))
        # The first verdict stays until the next step: FSDP updates on a stream of its own, which may read it later
        # than this one gives its memory to others.
        self._first = self._good = finite & ~self._run.state.guard.given_up
        self._norms = {}
        objective.backward()

    def _take(self, parameter: Tensor) -> None:
        """Update ``parameter`` from its gradient, of which under sharding each rank has its rows."""
        assert parameter.grad is not None
        norm = self._norms[parameter] = torch.linalg.vector_norm(parameter.grad)
        self._good = self._good & torch.isfinite(norm.to_local() if isinstance(norm, DTensor) else norm)
        with only(self._run.state.optimizer, self._group_of[parameter], parameter):
            self._run.state.guard.step_if(self._good, on_host=parameter not in self._begun)
        self._begun.add(parameter)
        parameter.grad = None

    def apply(self, loss: Tensor, sample_ids: list[int]) -> Tensor:
        run = self._run
        # As `clip_grad_norm_` computes it: the norm of the norms, in the order of the parameters.
        norms = [self._norms[p] for p in run.state.model.parameters() if p in self._norms]
        grad_norm = torch.linalg.vector_norm(torch.stack(norms))
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        run.state.guard.judge(run.state.progress.step + 1, loss, grad_norm, sample_ids)
        return grad_norm


def averaged(optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    """Within it the parameters are what the optimizer answers with; most answer with what they train."""
    return optimizer.averaged() if hasattr(optimizer, "averaged") else nullcontext()


def updates_each_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it may step one parameter alone: not where groups count steps, or ranks compute one matrix together."""
    return not getattr(optimizer, "counted", ()) and not getattr(optimizer, "needs_whole_gradients", False)


class only:  # noqa: N801 -- reads as a statement
    """Within it, ``optimizer`` knows one parameter alone, with the settings of its group."""

    def __init__(self, optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor):
        self._optimizer, self._groups = optimizer, optimizer.param_groups
        self._alone = [{**group, "params": [parameter]}]

    def __enter__(self) -> None:
        self._optimizer.param_groups = self._alone

    def __exit__(self, *error: object) -> None:
        self._optimizer.param_groups = self._groups
