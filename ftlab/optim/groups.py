"""Parameter groups: which weights decay."""

from __future__ import annotations

from typing import Any

from torch import nn


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups for an optimizer: matrices, which take its weight decay, and the rest, which never decays.

    Norm gains sit near 1 by design; pulling them to 0 only fights the network.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
