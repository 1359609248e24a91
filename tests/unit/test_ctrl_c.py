"""Ctrl-C while a configuration is read ends the command, wherever in a library it comes."""

from __future__ import annotations

import signal
import sys

import pytest

from ftlab import ctrl_c
from ftlab.errors import FtlabError
from ftlab.exit_codes import exit_code_of


@pytest.fixture(autouse=True)
def remembering(monkeypatch):
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(ctrl_c, "_came", False)
    ctrl_c.remember()
    yield
    signal.signal(signal.SIGINT, before)
    sys.unraisablehook = hook


class Garbage:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_it_interrupts_as_ever():
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert ctrl_c.came()


def test_one_that_python_drops_is_heeded_before_anything_is_launched(capsys):
    ctrl_c.heed()
    garbage = Garbage()
    del garbage  # nothing is raised
    assert capsys.readouterr().err == "", "Python would tell of an exception that it ignored"
    with pytest.raises(KeyboardInterrupt):
        ctrl_c.heed()


@pytest.mark.parametrize("other", [AttributeError("torn"), FtlabError("torn")])
def test_an_error_that_a_library_makes_of_it_is_not_told(other, capsys):
    def compose() -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise other

    assert exit_code_of(compose) == 130
    assert capsys.readouterr().err == ""


def test_without_it_errors_are_told_or_are_ours(capsys):
    def mistaken() -> int:
        raise FtlabError("seed: must be a number")

    def broken() -> int:
        raise AttributeError("ours")

    assert exit_code_of(mistaken) == 1
    assert capsys.readouterr().err == "seed: must be a number\n"
    with pytest.raises(AttributeError):
        exit_code_of(broken)
    assert exit_code_of(lambda: 3) == 3


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_who_ignores_it_or_listens_already_is_left_alone(handler):
    signal.signal(signal.SIGINT, handler)
    ctrl_c.remember()
    assert signal.getsignal(signal.SIGINT) is handler
