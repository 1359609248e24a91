"""Every global random generator: its seed, and its state as JSON."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch


def seed(number: int) -> None:
    """Seed all of them, on every device; two runs with the same seed then keep the same states."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def capture(device: torch.device) -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's global generators, torch's on ``device`` too."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],  # type: ignore[union-attr]
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
    }


def restore(states: dict[str, Any], device: torch.device) -> None:
    """Set them as they were; a CUDA state is left out where there is no such device."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_tensor(states["torch"]))
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(_tensor(states["cuda"]), device)


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
