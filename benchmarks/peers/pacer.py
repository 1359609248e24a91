"""How a contestant is paced: it does the steps it is told to, says what they took, and waits. No dependencies."""

from __future__ import annotations

import json
import sys
import time
from typing import Any


class Pacer:
    """Called by a training loop after each of its optimizer steps; stands still there between turns.

    Talks JSON lines over stdin and stdout: gets ``{"steps": n}`` or ``{"end": true}``, answers with the real tokens,
    seconds and losses of those steps.
    """

    def __init__(self) -> None:
        # Libraries print what they like; only the lines of this protocol go to the real standard output.
        self._out, sys.stdout = sys.stdout, sys.stderr
        self._left = 0
        self._turn: dict[str, Any] = {}
        self.over = False

    def ready(self, loss: float) -> None:
        """Everything is built; ``loss`` is that of the first rows with the weights as loaded. Waits for a turn."""
        self._say({"loss": loss})
        self._wait()

    def step_done(self, tokens: int, loss: float | None = None) -> None:
        """One more step with so many real tokens."""
        self._turn["tokens"] += tokens
        self._turn["losses"] += [] if loss is None else [loss]
        self._left -= 1
        if self._left == 0:
            self._turn["seconds"] = time.perf_counter() - self._start
            self._say(self._turn)
            self._wait()

    def finish(self, loss: float) -> None:
        """The last thing a contestant says: the loss of the first rows after all steps."""
        self._say({"loss": loss})

    def _wait(self) -> None:
        told = json.loads(sys.stdin.readline() or '{"end": true}')
        self.over = "end" in told
        self._left = told.get("steps", 0)
        self._turn = {"tokens": 0, "losses": []}
        self._start = time.perf_counter()

    def _say(self, line: dict[str, Any]) -> None:
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()
