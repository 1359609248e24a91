"""Ctrl-C before there is a run that listens to it.

Python raises KeyboardInterrupt wherever it is. In a callback of the garbage collector that is dropped, and a library's
``finally`` may fail for it and leave another error in its place; so what has come is remembered, too.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import Any

_came = False


def remember() -> None:
    """Remember Ctrl-C from now on, and raise KeyboardInterrupt as before; only a main thread can."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as under nohup, or listened to
        return
    with suppress(ValueError):
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = tell_of_others


def came() -> bool:
    """Whether Ctrl-C has come."""
    return _came


def heed() -> None:
    """Raise the KeyboardInterrupt that was lost, if there was one."""
    if _came:
        raise KeyboardInterrupt


def _interrupt(*_: Any) -> None:
    global _came
    _came = True
    raise KeyboardInterrupt


def tell_of_others(dropped: sys.UnraisableHookArgs) -> None:
    """``sys.unraisablehook`` that has no word for a KeyboardInterrupt that was dropped."""
    if dropped.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(dropped)
