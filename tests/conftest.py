"""Shared by all tests: one thread per process, the real data where it is, small helpers."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: tiny tensors gain nothing from threads, and parallel test workers lose nine-fold to them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# No test finds what another version of the code left behind, and none leaves anything behind.
if "FTLAB_CACHE_DIR" not in os.environ:  # a parallel worker has its parent's
    os.environ["FTLAB_CACHE_DIR"] = tempfile.mkdtemp(prefix="ftlab-test-cache-")
    atexit.register(shutil.rmtree, os.environ["FTLAB_CACHE_DIR"], ignore_errors=True)

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of the reliability figures that were measured."""
    from tests.faults import figures

    if figures.done:
        terminalreporter.write("\n" + figures.table([figure.row for figure in figures.done]))


@pytest.fixture(scope="session", autouse=True)
def products_as_in_a_run() -> None:
    """And the same for all that tests compare with one."""
    import torch

    from ftlab.models.cpu_products import speed_up_products

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        speed_up_products(dtype)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real rows and a real tokenizer that the project does not carry, for their licences."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not here: it holds the real Alpaca rows and the Llama 2 tokenizer")
    return SHARED_DATA
