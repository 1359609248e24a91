"""The table of figures at the end, and what the trials share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.distributed.jobs import end_all
from tests.faults import figures, harness


@pytest.fixture(scope="session", autouse=True)
def _clean_up() -> Iterator[None]:
    yield
    harness.clean_up()
    end_all()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not figures.done:
        return
    terminalreporter.write("\n" + figures.table([figure.row for figure in figures.done]))
