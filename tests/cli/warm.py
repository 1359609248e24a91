"""``python train.py …`` and ``python -m ftlab …`` in a moment: each command is forked from a process that is warm.

Warm: all of torch and of ftlab is imported there, nothing has been run. The forked process is the command's from its
arguments to its exit code, in its own folder, environment and process group, with the real stdout and stderr.

    python [-O] -m tests.cli.warm     serves JSON lines: {"argv", "cwd", "env", "out", "timeout_s", "starts"}
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
_LOADED_LATE = "datasets, torch._dynamo, torch._prims_common.wrappers"  # by some commands
_IMPORTED = (
    *("ftlab.jobs", "ftlab.config.check", "ftlab.cli", "ftlab.lab.plan", "hydra", "sentencepiece", "tokenizers"),
    "torch._dynamo",  # which torch itself imports with the first optimizer
)


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it said."""

    exit_code: int
    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: float  # what it would have taken on a machine of its own, waiting apart

    @property
    def lines(self) -> list[str]:
        """What is on stderr, without the first column of log lines and without empty lines."""
        return [line for line in self.stderr.splitlines() if line.strip()]


class Warm:
    """A warm process, from which commands are forked; a context that it does not outlive.

    Args:
        optimized: whether it runs without assertions, as under ``PYTHONOPTIMIZE=1``. pip compiles nothing for that:
            what commands load is compiled ahead here, whether or not this process may write bytecode.
    """

    def __init__(self, *, optimized: bool = False):
        self._command = [sys.executable, *(["-O"] if optimized else []), "-m", "tests.cli.warm"]
        self._bytecode = tempfile.TemporaryDirectory() if optimized else None

    def __enter__(self) -> Self:
        keeps = self._bytecode and {"PYTHONPYCACHEPREFIX": self._bytecode.name, "PYTHONDONTWRITEBYTECODE": None}
        if keeps:
            subprocess.run([sys.executable, "-O", "-c", f"import {_LOADED_LATE}"], env=environment(keeps), check=True)
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(keeps or {}),
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # it ends by itself then
        self._process.wait()
        if self._bytecode is not None:
            self._bytecode.cleanup()

    def __call__(
        self,
        *arguments: str,
        cwd: Path,
        env: Mapping[str, str | None] | None = None,
        timeout_s: float = 180,
        starts: bool = True,
    ) -> Said:
        """Run ``arguments``: ``train.py`` and what follows, or ``ftlab`` and a verb.

        Args:
            env: variables to set beside this process's own; None takes one away.
            starts: False: a run is not begun; its configuration is printed as JSON, job after job.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {
            "argv": arguments,
            "cwd": str(cwd),
            "env": environment(env or {}),
            "timeout_s": timeout_s,
            "starts": starts,
        }
        files = [cwd.parent / f".{cwd.name}.{name}" for name in ("stdout", "stderr")]
        self._process.stdin.write(json.dumps(job | {"out": [str(file) for file in files]}) + "\n")
        self._process.stdin.flush()
        ended = json.loads(self._process.stdout.readline())
        stdout, stderr = (file.read_text(encoding="utf-8", errors="replace") for file in files)
        for file in files:
            file.unlink()
        return Said(ended["exit_code"], stdout, stderr, ended["seconds"], ended["cpu_seconds"])


def cold(
    *arguments: str, cwd: Path, env: Mapping[str, str | None] | None = None, optimized: bool = False
) -> subprocess.Popen[str]:
    """The same command as a user starts it, in a process of its own."""
    script = ["-m", "ftlab"] if arguments[0] == "ftlab" else [str(ROOT / arguments[0])]
    command = [sys.executable, *(["-O"] if optimized else []), *script, *arguments[1:]]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(env or {}) | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's variables without a launcher's, with ``changes``."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    merged = kept | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "COLUMNS": "200"} | changes
    return {name: value for name, value in merged.items() if value is not None}


# ------------------------------------------------------------------------------------------ in the warm process


def _serve() -> None:
    for module in _IMPORTED:
        importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        began = time.monotonic()
        if (pid := os.fork()) == 0:
            _become(job)
        exit_code, cpu_seconds = _wait(pid, began + job["timeout_s"])
        ended = {"exit_code": exit_code, "seconds": time.monotonic() - began, "cpu_seconds": cpu_seconds}
        print(json.dumps(ended), flush=True)


def _wait(pid: int, deadline: float) -> tuple[int, float]:
    """Its exit code, a killing signal as a negative number, and its time; at the deadline it is killed."""
    while True:
        ended, status, used = os.wait4(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.005)


def _become(job: dict[str, Any]) -> None:
    """Be the command, and never return."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for fd, path in zip((1, 2), job["out"], strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, fd)
        os.close(file)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    if not job["starts"]:
        _only_show()
    script, *arguments = job["argv"]
    sys.argv = [script, *arguments]
    exit_code: object = 1
    try:
        if script == "ftlab":
            runpy.run_module("ftlab", run_name="__main__", alter_sys=False)
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        exit_code = 0
    except SystemExit as end:
        exit_code = end.code
        if isinstance(exit_code, str):
            print(exit_code, file=sys.stderr)
            exit_code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(exit_code or 0))  # type: ignore[call-overload]


def _only_show() -> None:
    """Print the configuration of a run, or of a sweep's first jobs, in place of beginning it."""
    sys.modules["ftlab.jobs"].launch = _show  # type: ignore[attr-defined]
    importlib.import_module("hydra.core.plugins").Plugins.instance()  # which runs the modules of its plugins anew
    launcher = importlib.import_module("hydra_plugins.ftlab_sweeps.launcher")

    def show_first(pool: Any, configs: Any) -> None:
        for config in configs[:2]:
            launcher._run(pool._task, config)
        sys.exit(0)

    launcher._Pool.run = show_first


def _show(config: dict[str, Any], *, own_process: bool) -> int:
    print(json.dumps(config))
    return 0


if __name__ == "__main__":
    _serve()
