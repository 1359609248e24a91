"""What the trials share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.jobs import end_all
from tests.faults import harness


@pytest.fixture(scope="session", autouse=True)
def _clean_up() -> Iterator[None]:
    yield
    harness.clean_up()
    end_all()
