"""No job outlives the tests of its module, however those end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.jobs import end_all


@pytest.fixture(scope="module", autouse=True)
def _no_job_is_left() -> Iterator[None]:
    yield
    end_all()
