"""A rank's watch while the rank is told to stop."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from ftlab.distributed.board import Board, RankError
from ftlab.distributed.heartbeat import Watch


class Garbage:
    """Is told to stop as it is collected, where Python drops what is raised."""

    def __del__(self) -> None:
        for _ in range(2):  # the first leaves time for the next `beat`
            signal.raise_signal(signal.SIGINT)
            time.sleep(1.5)


def test_an_interrupt_that_python_drops_is_not_told_and_not_lost(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest has its own
    watch = Watch(
        Board.create(tmp_path / "board", 1),
        rank=0,
        local_rank=0,
        timeout_s=60,
        on_stuck=lambda _: None,
        publish=lambda _: None,
        elsewhere=lambda: None,
    )
    with watch:
        watch.beat(1, "data")
        garbage = Garbage()
        del garbage
        assert capsys.readouterr().err == ""
        with pytest.raises((RankError, KeyboardInterrupt)):
            work(watch, seconds=20)


def work(watch: Watch, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        watch.beat(1, "forward")
        time.sleep(0.05)
