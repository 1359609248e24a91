"""Muon for the matrices of blocks, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from typing import Any

import torch


class Muon(torch.optim.Optimizer):
    """torch's Muon (Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982) beside torch's AdamW.

    Muon orthogonalises a matrix's momentum. That means something for matrices between hidden states; embedding and
    head, norms and biases are AdamW's. Updates are scaled to the size of AdamW's, so that both share learning rate
    and weight decay.

    Args:
        params: groups; those with ``hidden: True`` are Muon's (`ftlab.optim.groups`).
        momentum, nesterov, ns_steps: Muon's; the last is iterations of Newton and Schulz, in bfloat16.
        betas, eps: AdamW's.
    """

    # Of a sharded matrix all ranks compute together, so none may leave a step out by itself.
    needs_whole_gradients = True

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        betas: tuple[float, float],
        eps: float,
    ):
        groups = [given if isinstance(given, dict) else {"params": [given], "hidden": True} for given in params]
        groups = [group for group in groups if group["params"]]
        hidden, others = ([group for group in groups if group["hidden"] == which] for which in (True, False))
        muon: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        self._parts: list[torch.optim.Optimizer] = []
        if hidden:
            self._parts.append(
                torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw", **muon)
            )
        if others:
            adamw = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=True)
            self._parts.append(adamw)
        # Their groups hold their settings by now, and are this optimizer's: one schedule, one state.
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None, "gradients are there already"
        for part, is_muon in ((part, isinstance(part, torch.optim.Muon)) for part in self._parts):
            part.param_groups = [group for group in self.param_groups if group["hidden"] == is_muon]
            part.state = self.state
            part.step()
