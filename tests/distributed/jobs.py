"""Whole jobs from the outside: ``train.py`` as a user starts it, its processes, its folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "train.py")
PYTHON = [sys.executable, TRAIN]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", TRAIN]
TINY = [
    *("model.dim=16", "model.n_heads=2", "model.n_layers=1", "model.ffn_hidden_dim=32", "seq_len=96"),
    *("dataset.max_samples=64", "dataset.val_fraction=0", "logger=[jsonl]", "checkpoint.export=false"),
    *("device=cpu", "seed=0"),
]
ENDLESS = ["trainer.max_steps=1000000", "trainer.log_every_steps=10"]
_started: list[Job] = []


def end_all() -> None:
    """Kill what is left of every job that was started: a test that failed may not have come to its end."""
    while _started:
        job = _started.pop()
        for process in job.look():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if job.process.poll() is None:
            job.process.kill()
        job.process.wait()


class Job:
    """A started command; ``wait`` for its end, or do something to one of its ranks first.

    Args:
        tiny: give it the arguments of a tiny run too; not for one that goes on, which has them.

    Attributes:
        temp: the folder that its processes take for the machine's temporary one.
    """

    def __init__(self, command: list[str], *arguments: str, cwd: Path, tiny: bool = True):
        self.cwd, self.temp = cwd, Path(tempfile.mkdtemp(prefix="temp", dir=cwd))
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment |= {"TMPDIR": str(self.temp), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        self._shared_memory: set[str] = set()
        self.process = subprocess.Popen(
            [*command, *(TINY if tiny else ()), *arguments],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that Ctrl-C can be sent to all of it, and to nothing else
        )
        self._all: dict[int, psutil.Process] = {}
        _started.append(self)

    def look(self) -> list[psutil.Process]:
        """All processes of the job that are alive now; remembered, for they may be orphans later."""
        with_children = [self.process.pid] + [p.pid for p in _children(self.process.pid)]
        for pid in with_children:
            if pid not in self._all and psutil.pid_exists(pid):
                self._all[pid] = psutil.Process(pid)
        return [p for p in self._all.values() if _is_alive(p)]

    def ranks(self) -> list[psutil.Process]:
        """The worker processes, rank 0 first."""
        self.look()
        marks = ("multiprocessing.spawn", "-u " + TRAIN)
        found = [p for p in _children(self.process.pid) if any(m in " ".join(_command(p)) for m in marks)]
        return sorted(found, key=lambda p: p.pid)

    def wait_for_ranks(self, n: int) -> list[psutil.Process]:
        """The ``n`` worker processes, as soon as all exist."""
        self.wait_until(lambda: len(self.ranks()) >= n, "its ranks")
        for process in self.look():  # others on this machine have files there too: remember which are this job's
            with suppress(OSError):
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                self._shared_memory |= set(re.findall(r"/dev/shm/\S+", maps))
        return self.ranks()

    def wait_for_step(self, step: int) -> None:
        """Return once the job has logged ``step``."""
        self.wait_until(lambda: any(line.get("step", 0) >= step for line in self.metrics()), f"step {step}")

    def wait_until(self, there: Callable[[], object], what: str) -> None:
        """Return once ``there()``, while the job runs."""
        deadline = time.monotonic() + 60
        while not there():
            assert self.process.poll() is None, f"ended without {what}: {self.process.communicate()}"
            assert time.monotonic() < deadline, f"no {what}"
            time.sleep(0.02)

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends SIGINT to every process in the foreground."""
        self.look()
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self, timeout_s: float = 240) -> int:
        """The exit code, and ``stdout`` and ``stderr`` of the ended job."""
        self.look()
        try:
            self.stdout, self.stderr = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        return self.process.returncode

    def left_behind(self, grace_s: float = 1.0) -> list[Any]:
        """Processes, shared memory and temporary files that are there ``grace_s`` after the job's end."""
        deadline = time.monotonic() + grace_s
        while (found := self._left_behind()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def _left_behind(self) -> list[Any]:
        # torch's own: its cache, and the folder that torchrun keeps logs in.
        files = [name for name in os.listdir(self.temp) if not name.startswith(("torchinductor_", "torchelastic_"))]
        return [*self.look(), *filter(os.path.exists, self._shared_memory), *files]

    @property
    def folders(self) -> list[Path]:
        """The run folders it made."""
        # `rglob` would raise where a checkpoint is removed while it looks.
        return sorted(Path(folder) for folder, _, files in os.walk(self.cwd) if "run.json" in files)

    def run_json(self) -> dict[str, Any]:
        """``run.json`` of its only folder."""
        [folder] = self.folders
        return json.loads((folder / "run.json").read_text())

    def metrics(self) -> list[dict[str, Any]]:
        """The complete lines of ``metrics.jsonl``, of all its folders."""
        lines: list[dict[str, Any]] = []
        for folder in self.folders:
            if (folder / "metrics.jsonl").exists():
                text = (folder / "metrics.jsonl").read_text()
                lines += [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return lines

    def losses(self) -> list[float]:
        """Training losses in the order of the steps."""
        return [line["train/loss"] for line in self.metrics() if "train/loss" in line]


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
