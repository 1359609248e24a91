"""A copy of conf/ to write into, and the problems of a command line as text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlab.config import check, compose
from ftlab.errors import ConfigErrors


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's conf/, copied: files can be added and changed. This machine's own local/ stays behind."""
    copy = tmp_path / "conf"
    shutil.copytree(compose.CONF, copy, ignore=shutil.ignore_patterns("local"))
    monkeypatch.setattr(compose, "CONF", copy)
    return copy


@pytest.fixture
def problems() -> Callable[..., str]:
    """What phase one, which needs no torch, has to say about a command line."""

    def find(*overrides: str) -> str:
        try:
            _, found = check.first_phase(compose.compose(overrides))
        except ConfigErrors as errors:
            found = errors.problems
        assert all(len(str(problem).splitlines()) <= 3 for problem in found)
        return "\n".join(map(str, found))

    return find
