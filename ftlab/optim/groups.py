"""Parameter groups: which weights decay, and which are matrices between hidden states."""

from __future__ import annotations

from typing import Any

from torch import nn


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Three groups for an optimizer: hidden matrices, other matrices, and the rest, which never decays.

    Norm gains sit near 1 by design; pulling them to 0 only fights the network. ``hidden`` marks the matrices of
    blocks, which map hidden states to hidden states; embedding and head speak about tokens. Muon wants to know.
    """
    in_blocks = set(model.get_submodule("blocks").parameters())
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2]
    return [
        {"params": [p for p in matrices if p in in_blocks and p.ndim == 2], "hidden": True},
        {"params": [p for p in matrices if p not in in_blocks or p.ndim > 2], "hidden": False},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "hidden": False},
    ]
