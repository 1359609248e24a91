"""Which steps may change the weights: a verdict on every step, made on the device, where its numbers are."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftlab.distributed.base import Parallelism
from ftlab.errors import NonFiniteError

log = logging.getLogger(__name__)

WINDOW = 128  # steps that a spike is measured against
_SHOWN = 64  # samples of a bad step that a message names


class StepGuard:
    """Takes an optimizer step only if its numbers are good, without the host waiting for the device.

    A step is bad if its loss or gradient norm is NaN or infinite or, with ``spike_sigma``, a spike. It leaves weights
    and optimizer state as they were, bit for bit; the schedule and the data go on, being functions of the step. So
    many in a row are left out; from the next one on nothing changes the weights any more, and ``check`` raises. Loss
    and norm are global: every rank decides the same.

    A fused optimizer takes the verdict as ``found_inf``, the flag that torch's loss scaler uses.

    Attributes:
        between_steps: whether the weights are always those after a whole step.

    Args:
        max_skipped: bad steps in a row that are left out.
        spike_sigma: a loss so many standard deviations above the mean of the last ``WINDOW`` steps is a spike; null:
            none is. Judged once half the window is known. Gradient norms are not judged: in healthy runs, too, theirs
            have tails far beyond a normal distribution's, and clipping bounds what they do.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        parallel: Parallelism,
        *,
        max_skipped: int,
        spike_sigma: float | None,
    ):
        self._optimizer, self._scaler, self._parallel = optimizer, scaler, parallel
        self._max_skipped, self._spike_sigma = max_skipped, spike_sigma
        self.between_steps = True
        self._has_stepped = False
        self._in_a_row = torch.zeros((), dtype=torch.float64, device=parallel.device)
        # (WINDOW,): losses of the last steps; NaN where there were none yet.
        self._losses = torch.full((WINDOW,), math.nan, dtype=torch.float64, device=parallel.device)
        self._unseen: list[tuple[int, list[int], Tensor]] = []  # since the last check: step, this rank's samples, facts

    def update(self, step: int, loss: Tensor, grad_norm: Tensor, sample_ids: list[int]) -> None:
        """Take the optimizer step if its numbers are good; ``step`` counts from 1."""
        self.step_if(self.judge(step, loss, grad_norm, sample_ids), on_host=not self._has_stepped)
        if self._scaler.is_enabled():
            self._scaler.update()

    @property
    def given_up(self) -> Tensor:
        """Whether too many steps were bad, () on the device: nothing may change the weights any more."""
        return self._in_a_row > self._max_skipped

    def judge(self, step: int, loss: Tensor, grad_norm: Tensor, sample_ids: list[int]) -> Tensor:
        """Whether the weights may be changed by this step, () on the device; it is remembered for `check`."""
        numbers = torch.stack([loss, grad_norm]).double()
        finite = numbers.isfinite()
        good = finite.all()
        if self._spike_sigma is not None:
            good = good & ~self._is_spike(numbers[0])
        bad = ~good
        if self._scaler.is_enabled():
            # Scaled gradients that overflow are part of loss scaling: the scaler lowers its scale, and none is bad.
            bad = bad & ~(finite[0] & ~finite[1])
        given_up = self.given_up
        self._in_a_row = torch.where(given_up | bad, self._in_a_row + 1, self._in_a_row * ~good)
        self._unseen.append((step, sample_ids, torch.cat([bad[None], self._in_a_row[None], numbers])))
        return good & ~given_up

    def check(self) -> int:
        """The number of steps left out since the last check, each told in the log. Waits for the device.

        A collective where there were any.

        Raises:
            NonFiniteError: too many in a row; names the step, its numbers and its samples.
        """
        facts = torch.stack([facts for *_, facts in self._unseen]).tolist() if self._unseen else []
        seen, self._unseen = self._unseen, []
        n_skipped = 0
        for (step, sample_ids, _), (bad, in_a_row, loss, grad_norm) in zip(seen, facts, strict=True):
            if not bad:
                continue
            everyone = self._parallel.gather(sample_ids)
            what = _Bad(step, loss, grad_norm, [i for ids in everyone for i in ids])
            if in_a_row > self._max_skipped:
                raise NonFiniteError(what.told(self._max_skipped, between_steps=self.between_steps))
            level = logging.WARNING if self._parallel.rank == 0 else logging.INFO  # one rank talks, all write it down
            log.log(level, "step %d is left out: %s; samples (rows of the source): %s", step, what.numbers, what.rows)
            n_skipped += 1
        if self._scaler.is_enabled() and self._scaler.get_scale() < 2.0**-10:
            raise NonFiniteError(
                f"gradients overflow float16 even with the loss scaled by {self._scaler.get_scale():.1g}\n"
                "  try: precision=bf16_mixed"
            )
        return n_skipped

    def state_dict(self) -> dict[str, Any]:
        """What is remembered of earlier steps, for JSON; the same on every rank."""
        return {"in_a_row": int(self._in_a_row), "losses": self._losses[self._losses.isfinite()].tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what `state_dict` told."""
        self._in_a_row.fill_(min(state["in_a_row"], self._max_skipped))  # it may be fewer by now
        if known := state["losses"][-WINDOW:]:
            self._losses[-len(known) :] = torch.tensor(known, dtype=torch.float64)

    def _is_spike(self, loss: Tensor) -> Tensor:
        """Whether ``loss``, () on the device, is far above what it was lately; it is remembered."""
        assert self._spike_sigma is not None
        n_known = self._losses.isfinite().sum()
        mean = self._losses.nanmean()
        deviation = ((self._losses - mean).square().nansum() / (n_known - 1)).sqrt()
        # At least a thousandth of the mean: of losses that hardly differ, rounding is no spike.
        limit = mean + self._spike_sigma * torch.maximum(deviation, mean.abs() / 1000)
        is_spike = (loss > limit) & (n_known >= WINDOW // 2)
        # A spike counts as the limit: one hardly moves it, and a level that lasts becomes what is usual.
        remembered = torch.cat([self._losses[1:], torch.where(is_spike, limit, loss)[None]])
        self._losses = torch.where(loss.isfinite(), remembered, self._losses)
        return is_spike

    def step_if(self, good: Tensor, *, on_host: bool) -> None:
        """Let the optimizer update all that has gradients, if ``good``.

        Args:
            on_host: wait for the device. Not every kernel can decide there. Of those that can, SGD's would in the
                very first step of a weight leave a momentum behind that nobody has written to.
        """
        if self._optimizer.defaults.get("fused") and not on_host:
            # Weights that are kept on the host are updated there; torch would send the flag without waiting for it.
            where = next(p.device for group in self._optimizer.param_groups for p in group["params"])
            self._optimizer.found_inf = (~good).float().to(where)  # type: ignore[attr-defined]
            self._optimizer.grad_scale = None  # type: ignore[attr-defined]
            self._optimizer.step()
        elif not bool(good):  # waits for the device
            self._optimizer._opt_called = True  # type: ignore[attr-defined] # else torch warns: its schedule is ahead
        else:
            self._optimizer.step()
            self._has_stepped = True


@dataclass(frozen=True)
class _Bad:
    """A bad step, as messages tell it."""

    step: int
    loss: float
    grad_norm: float
    samples: list[int]

    @property
    def numbers(self) -> str:
        spike = ", far above the steps before" if math.isfinite(self.loss) and math.isfinite(self.grad_norm) else ""
        return f"loss is {self.loss:.6g}, gradient norm {self.grad_norm:.6g}{spike}"

    @property
    def rows(self) -> str:
        more = f" and {len(self.samples) - _SHOWN} more" if len(self.samples) > _SHOWN else ""
        return ", ".join(map(str, self.samples[:_SHOWN])) + more

    def told(self, max_skipped: int, *, between_steps: bool) -> str:
        """Why the run ends here."""
        before = f"before the last {max_skipped} steps, left out as well" if max_skipped else "of the step before"
        weights = f"the weights are those {before}" if between_steps else "a part of the weights is updated already"
        return (
            f"step {self.step}: {self.numbers}; {weights}.\n"
            f"  samples of this step (rows of the source): {self.rows}\n"
            "  try: a lower optimizer.lr, trainer.max_grad_norm=1.0, or precision=fp32 to rule precision out"
            + ("" if max_skipped or not between_steps else "; trainer.max_skipped_steps=5 goes on without such steps")
        )
