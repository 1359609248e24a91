"""Fifty kinds of wrong input: exit code 2, at most three lines that name the culprit, no traceback.

Each is a whole command, ``train.py`` with its arguments, environment and files, forked from a warm process; some run
cold, as they are typed. Nothing that was there before is changed, and nothing is trained.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from tests.cli.bad_input import CASES, QUIET, SMALL, Case, Place
from tests.cli.warm import Said, Warm, cold
from tests.faults.figures import Figure

MAX_LINES, MAX_SECONDS = 3, 5.0


def by_content(folder: Path) -> dict[str, str]:
    """Every file of a folder by its content, every link by where it leads."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def hold(case: Case, warm: Warm, place: Place) -> Said:
    """Check that the command says what it should and leaves alone what was there."""
    typed = case.typed(place) if callable(case.typed) else case.typed
    arguments = [*(SMALL if case.small else ()), *(case.logger if case.small else ()), *typed]
    with closing(socket.socket()) as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        env = {name: str(busy.getsockname()[1]) if value == "BUSY" else value for name, value in case.env.items()}
        was = by_content(place.folder)
        said = warm("train.py", *arguments, cwd=place.folder, env=env)
    now = by_content(place.folder)
    assert said.exit_code == case.exit_code, said.stderr
    assert re.search(".*".join(case.says), said.stderr, re.DOTALL | re.MULTILINE), said.stderr
    assert "Traceback" not in said.stderr + said.stdout
    assert {name: now.get(name) for name in was} == was, "what was there has changed"
    if case.exit_code:
        assert said.cpu_seconds <= MAX_SECONDS
        assert len(said.lines) <= MAX_LINES, said.stderr
        assert [name for name in now if name.endswith("metrics.jsonl") and name not in was] == []
    return said


# ------------------------------------------------------------------- those that are not a command with exit code 2


def other_ranks(warm: Warm, place: Place) -> None:
    """B24: not wrong here. A checkpoint is rows, and any number of ranks goes on."""
    run = place.run()
    more = ("trainer.max_steps=4", "parallelism=ddp", "parallelism.nproc_per_node=2")
    said = warm("train.py", f"resume={run}", *more, cwd=place.folder)
    assert said.exit_code == 0, said.stderr
    assert json.loads((run / "run.json").read_text())["resumed"][0]["ranks"] == 2


def pad_is_eos(warm: Warm, place: Place) -> None:
    """B35: not wrong here. Padding is told by position, and the report says so."""
    weights = place.weights()
    tokens = json.loads((weights / "tokenizer_config.json").read_text())
    (weights / "tokenizer_config.json").write_text(json.dumps(tokens | {"pad_token": tokens["eos_token"]}))
    typed = ("tokenizer=huggingface", f"tokenizer.path={weights}")
    said = warm("train.py", *SMALL, *QUIET, *typed, cwd=place.folder)
    assert said.exit_code == 0, said.stderr
    said = warm("ftlab", "check-data", *SMALL, *typed, cwd=place.folder)
    assert said.exit_code == 0, said.stderr
    assert "padding uses EOS's id; only padding is masked" in said.stdout + said.stderr


def without_assertions(warm: Warm, place: Place) -> None:
    """B49: as a user would start it with assertions off; `test_...without_assertions` does all fifty so."""
    process = cold("train.py", "optimizer.lr=-1", cwd=place.folder, optimized=True)
    _, stderr = process.communicate(timeout=180)
    assert (process.returncode, stderr.splitlines()[0]) == (2, "optimizer.lr: must be > 0, got -1")


def interrupted(warm: Warm, place: Place) -> None:
    """B50: Ctrl-C while the configuration is read."""
    for delay_s in (0.15, 0.3, 0.5):
        process = cold("train.py", "-m", *SMALL, f"seed={','.join(map(str, range(60)))}", cwd=place.folder)
        time.sleep(delay_s)
        os.killpg(process.pid, signal.SIGINT)
        try:
            _, stderr = process.communicate(timeout=180)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert "Traceback" not in stderr, stderr
        # Before Python has begun to listen, the signal itself ends it.
        assert process.returncode in (130, -signal.SIGINT), (process.returncode, stderr)
        assert by_content(place.folder) == {}


OTHERS: dict[int, Callable[[Warm, Place], None]] = {
    24: other_ranks,
    35: pad_is_eos,
    49: without_assertions,
    50: interrupted,
}
QUICK = [n for n in CASES if n not in (20, 23, 26, 28, 30, 33, 36, 39, 41, 43)]
ALL = sorted([*CASES, *OTHERS])
numbers = pytest.mark.parametrize("numbers", [QUICK, pytest.param(ALL, marks=pytest.mark.soak)], ids=["quick", "all"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that went well."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with Warm() as warm:
        said = warm("train.py", *SMALL, *QUIET, f"paths.output_dir={folder}", cwd=folder.parent)
    assert said.exit_code == 0, said.stderr
    return folder


def try_all(figure: Figure, numbers: Sequence[int], warm: Warm, finished: Path, tmp_path: Path) -> None:
    slowest = 0.0
    for number in numbers:
        with figure.trial(f"B{number}"):
            for i, case in enumerate(CASES.get(number, ())):
                (folder := tmp_path / f"{number}-{i}").mkdir()
                slowest = max(slowest, hold(case, warm, Place(folder, finished)).cpu_seconds)
            if number in OTHERS:
                (folder := tmp_path / str(number)).mkdir()
                OTHERS[number](warm, Place(folder, finished))
    figure.remarks.append(f"slowest {slowest:.1f} s")


def test_the_list_is_whole() -> None:
    assert list(range(1, 51)) == ALL


@numbers
def test_wrong_input_is_named_before_anything_is_done(numbers: list[int], finished: Path, tmp_path: Path) -> None:
    claim = "wrong input: exit code 2, at most 3 lines that name it, no traceback, nothing written over"
    with Figure("B1", claim) as figure, Warm() as warm:
        try_all(figure, numbers, warm, finished, tmp_path)


@pytest.mark.soak
def test_wrong_input_is_named_without_assertions_too(finished: Path, tmp_path: Path) -> None:
    with Figure("B2", "the same under PYTHONOPTIMIZE=1") as figure, Warm(optimized=True) as warm:
        try_all(figure, ALL, warm, finished, tmp_path)


@pytest.mark.soak
def test_wrong_input_is_named_in_a_cold_process_too(finished: Path, tmp_path: Path) -> None:
    with Figure("B3", "the same, one of each kind that needs no files, as typed in a cold process") as figure:
        slowest = 0.0
        for number, (case, *_) in CASES.items():
            if callable(case.typed) or case.env or case.exit_code != 2:
                continue
            with figure.trial(f"B{number}"):
                (folder := tmp_path / str(number)).mkdir()
                began = time.monotonic()
                process = cold("train.py", *SMALL, *QUIET, *case.typed, cwd=folder)
                _, stderr = process.communicate(timeout=180)
                slowest = max(slowest, time.monotonic() - began)
                assert process.returncode == 2, stderr
                assert re.search(".*".join(case.says), stderr, re.DOTALL | re.MULTILINE), stderr
        figure.remarks.append(f"slowest {slowest:.1f} s")
