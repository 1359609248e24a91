"""W&B, the disk, the cache and other jobs may fail a run: it trains on, to the same weights, and leaks nothing."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from ftlab.config.check import compose_config
from ftlab.outputs.folder import FolderInUseError
from tests.distributed.jobs import PYTHON, Job
from tests.faults.acts import HoldAt, Measure
from tests.faults.figures import Figure, trials
from tests.faults.harness import Folder, Trial, assert_same, content_of, reference
from tests.faults.test_full_disk import check_state, mounted
from tests.faults.test_kills import FSDP, LAYOUTS, SINGLE
from tests.faults.trial import Plan
from tests.faults.troubles import DiskFails, WithWandb
from tests.faults.wandb_server import Server, serving

OUTAGES = ("closed", "killed", "hole", "500", "401", "names", "full")
MOMENTS = {"start": 0, "middle": 6, "end": 12}


def showing(plan: Plan) -> Plan:
    """``plan`` with W&B among its loggers, as ``conf/`` has it."""
    plan.config["logger"]["wandb"] = compose_config([])["logger"]["wandb"]
    return plan


@trials(few=2, all_=21)
def test_r18_whatever_happens_to_wandb(n: int, tmp_path: Path) -> None:
    claim = (
        "W&B: closed port, black hole, HTTP 500 and 401, no name service, its process killed, its disk full; before "
        "the start, in the middle, at the end: exit code 0, weights bitwise; its folder can be synced, and is whole "
        "where W&B was out of reach from the start"
    )
    shares = []
    cases = [(outage, moment) for moment in ("start", "middle", "end") for outage in OUTAGES]
    few = [("closed", "start"), ("500", "middle")]
    with Figure("R18", claim) as figure:
        for outage, moment in cases if n > 2 else few:
            with figure.trial(f"{outage} at the {moment}"):
                shares.append(fail_wandb(tmp_path / f"{outage}-{moment}", outage, moment))
        figure.remarks.append(f"at most {max(shares, default=1):.2%} of the training thread's time")
    assert max(shares) < 0.01


def fail_wandb(root: Path, outage: str, moment: str) -> float:
    """A run during which W&B fails; returns the share of time that W&B took of its training thread's."""
    step = MOMENTS[moment]
    folder, go = Folder(root), root / "go"
    if outage in ("names", "full") and os.geteuid() != 0:
        pytest.skip("only root may mount")
    with ExitStack() as stack:
        server = stack.enter_context(serving())
        host, hosts = "127.0.0.1", None
        if outage == "names":
            host, hosts = "wandb.test", root / "hosts"
            hosts.write_text("127.0.0.1 localhost wandb.test\n")
        if outage == "full":
            stack.enter_context(mounted(folder.run / "wandb", "-t", "tmpfs", "-o", "size=3m", "none"))
        plan = folder.plan(act=HoldAt((step,), go), before=WithWandb(f"http://{host}:{server.server_port}", hosts))
        with Trial(showing(plan)) as trial:
            assert trial.next_word() is not None
            if step:
                wait_until(lambda: server.begun or outage == "full", "W&B's start")
            spoil(outage, server, folder, trial.processes[0].pid or 0, go)
            go.touch()
            [outcome] = trial.end()
            stderr = trial.stderr()
        assert outcome is not None
        assert outcome.exit_code == 0, stderr
        assert "Traceback" not in stderr, stderr
        assert folder.record()["status"] == "completed"
        _, expected = reference()
        check_state([outcome], expected)
        check_arrival(folder, server.rows.get(folder.record()["id"], []), outage, moment)
    in_wandb, training = json.loads((folder.notes / "seconds").read_text())
    return in_wandb / training


def spoil(outage: str, server: Server, folder: Folder, pid: int, go: Path) -> None:
    match outage:
        case "killed":
            if not server.begun:  # before the start there is none yet
                go.touch()
            wait_until(lambda: service_of(pid), "W&B's own process")
            for process in service_of(pid):
                process.kill()
        case "names":
            (folder.root / "hosts").write_text("127.0.0.1 localhost\n")
            server.fail("hole")  # whoever knows the address still
        case "full":
            with suppress(OSError), (folder.run / "wandb" / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(4096))
        case _:
            server.fail(outage)


def service_of(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return [child for child in psutil.Process(pid).children(recursive=True) if child.name() == "wandb-core"]
    return []


def check_arrival(folder: Folder, arrived: list[int], outage: str, moment: str) -> None:
    """What W&B keeps on the disk can be uploaded later: all of it, unless W&B had begun to upload it itself."""
    kept = sorted(path.parent for path in (folder.run / "wandb").glob("*run-*/*.wandb"))
    if outage in ("killed", "full"):  # what there is was torn
        return
    assert kept
    with serving() as server:
        environment = os.environ | {
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
            "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
            "WANDB_MODE": "online",
        }
        for path in kept:
            command = [sys.executable, "-m", "wandb", "sync", "--no-skip-online", str(path)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
            assert done.returncode == 0, done.stderr
        synced = server.rows.get(folder.record()["id"], [])
    if moment == "start":
        assert set(arrived) | set(synced) == set(range(1, 13)), f"{arrived} arrived, {synced} were synced"


def wait_until(there, what: str) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.005)


def test_r18_a_killed_run_goes_on_in_the_same_wandb_run_and_no_step_is_there_twice(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    with serving() as server:
        before = WithWandb(f"http://127.0.0.1:{server.server_port}")
        with Trial(showing(folder.plan(act=HoldAt((8,), tmp_path / "never"), before=before))) as trial:
            assert trial.next_word() is not None
            wait_until(lambda: 7 in server.rows.get(folder.record()["id"], []), "rows at the server")
            trial.kill()
        with Trial(showing(folder.plan(before=before))) as trial:
            [outcome] = trial.end()
        assert outcome is not None
        assert outcome.exit_code == 0
        assert list(server.rows) == [folder.record()["id"]]
        [rows] = server.rows.values()
        assert sorted(set(rows)) == list(range(1, 13))
        assert len(rows) == 12, rows
    check_state([outcome], reference()[1])


@trials(few=2, all_=20)
def test_r13_a_disk_that_fails_for_a_while(n: int, tmp_path: Path) -> None:
    claim = (
        "every write below the run's folder fails for some steps (full, read-only, broken): told, trained on, and "
        "nothing is missing afterwards: metrics, ledger, samples, newest checkpoints bitwise"
    )
    with Figure("R13w", claim) as figure:
        for number in range(n):
            n_ranks, overrides = LAYOUTS[(number + 1) % 3]
            rng = figure.random(number)
            code, first = (errno.ENOSPC, errno.EROFS, errno.EIO)[number % 3], rng.randrange(1, 8)
            fails = DiskFails(code, first, rng.randrange(first + 1, 10))
            with figure.trial(f"{number}: {fails}"):
                folder = Folder(tmp_path / str(number), *overrides, n_ranks=n_ranks)
                with Trial(folder.plan(before=fails), n_ranks) as trial:
                    outcomes, stderr = trial.end(), trial.stderr()
                assert {outcome and outcome.exit_code for outcome in outcomes} == {0}, stderr
                assert "Traceback" not in stderr, stderr
                assert "metrics.jsonl cannot be written: " + os.strerror(code) in stderr, stderr
                assert_same(folder, outcomes, files=False)  # type: ignore[arg-type]
                other, _ = reference(*overrides, n_ranks=n_ranks)
                assert folder.samples(0) == other.samples(0)
                assert folder.contents()["step_00000012"] == other.contents()["step_00000012"]


@trials(few=1, all_=20)
def test_r20_two_jobs_want_one_folder(n: int, tmp_path: Path) -> None:
    claim = (
        "a second job in the folder of a running one: refused with exit code 2, the first goes on bitwise; the lock of "
        "one that was killed is no hindrance"
    )
    with Figure("R20", claim) as figure:
        for number in range(n):
            rng = figure.random(number)
            n_ranks, overrides = LAYOUTS[(number + 1) % 3]
            folder, go = Folder(tmp_path / str(number), *overrides, n_ranks=n_ranks), tmp_path / f"go{number}"
            with figure.trial(number):
                with Trial(folder.plan(act=HoldAt((rng.randrange(4, 12),), go)), n_ranks) as first:
                    assert first.next_word() is not None
                    other = Folder(tmp_path / f"{number}-second", *overrides, n_ranks=n_ranks)
                    other.run = folder.run
                    with Trial(other.plan(), n_ranks) as second:
                        while second.next_word() is not None:
                            pass
                        said = second.stderr() + "".join(second.failures.values())
                    codes = {outcome.exit_code for outcome in second.outcomes if outcome}
                    assert codes <= {FolderInUseError.exit_code}, said
                    assert f"{folder.run} is in use by process {first.processes[0].pid} on " in said
                    go.touch()
                    if number % 2:
                        first.kill()
                        outcomes = folder.train()
                    else:
                        outcomes = first.end()  # type: ignore[assignment]
                assert_same(folder, outcomes)


def shared_memory_of(pid: int) -> set[str]:
    """Names of what the process has mapped of /dev/shm; nothing of one that has ended."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    return set(re.findall(r"/dev/shm/(\S+)", maps))


@trials(few=400, all_=5000)
def test_r21_nothing_leaks(n: int, tmp_path: Path) -> None:
    claim = f"{n} steps with checkpoints and validation: open files, threads and children constant, memory's slope"
    with Figure("R21", claim) as figure, figure.trial(n):
        folder = Folder(
            tmp_path / "run",
            *(f"trainer.max_steps={n}", f"checkpoint.every_steps={n // 10}", f"evaluation.every_steps={n // 5}"),
            "trainer.gradient_accumulation_steps=1",
        )
        told = []
        with Trial(folder.plan(act=Measure(n // 40), noise=False)) as trial:
            root = psutil.Process(trial.processes[0].pid)
            children = root.children(recursive=True)
            shared: set[str] = set()  # other programs of the machine have memory there too
            while (word := trial.next_word(600)) is not None:
                told.append(word)
                if root.is_running():
                    shared |= shared_memory_of(root.pid)
            [outcome] = trial.end()
        assert outcome is not None
        assert outcome.exit_code == 0
        steps, rss, n_fds, n_threads, n_children = np.array(told).T
        late = steps > n // 2
        slope = np.polyfit(steps[late], rss[late], 1)[0]
        figure.remarks.append(f"{slope:.0f} B/step over the second half, {rss[-1] / 2**20:.0f} MiB")
        for counts in (n_fds, n_threads, n_children):
            assert len(set(counts[late])) == 1, counts
        assert slope < 1000 or n < 1000, f"{slope} B/step: {rss}"
        assert not [child for child in children if child.is_running()]
        assert not shared & set(os.listdir("/dev/shm"))


@trials(few=2, all_=10)
def test_r9_the_same_again(n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = (
        "`train.py`, one configuration, any PYTHONHASHSEED, cold and warm cache: losses and checkpoint bitwise the same"
    )
    arguments = ["trainer.max_steps=20", "trainer.batch_size=2", "dataset.packing=best_fit", "hydra.run.dir=run"]
    found = []
    with Figure("R9", claim) as figure:
        for number in range(n):
            with figure.trial(number):
                monkeypatch.setenv("PYTHONHASHSEED", str(figure.random(number).randrange(2**32)))
                monkeypatch.setenv("FTLAB_CACHE_DIR", str(tmp_path / f"cache{number - number % 2}"))  # cold, warm
                cwd = tmp_path / str(number)
                cwd.mkdir()
                job = Job(PYTHON, *arguments, cwd=cwd)
                assert job.wait(120) == 0, job.stderr
                content = content_of(cwd / "run" / "checkpoints" / "step_00000020")
                del content["MANIFEST.json"]["config_hash"], content["state.json"]["config"]
                found.append((job.losses(), content))
                assert found[-1] == found[0]


@trials(few=1, all_=10)
def test_r23_what_a_run_wrote_down_runs_again(n: int, tmp_path: Path) -> None:
    claim = "a run's own config.yaml, run again: bitwise the same end"
    with Figure("R23", claim) as figure:
        for number in range(n):
            n_ranks, overrides = (SINGLE, FSDP)[number % 2]
            rng: random.Random = figure.random(number)
            overrides = (
                *overrides,
                f"optimizer={rng.choice(['sgd', 'adamw'])}",
                f"scheduler={rng.choice(['wsd', 'linear'])}",
            )
            with figure.trial(f"{number}: {overrides}"):
                other, expected = reference(*overrides, n_ranks=n_ranks)
                again = Folder(tmp_path / str(number), *overrides, n_ranks=n_ranks)
                plan = again.plan()
                config = yaml.safe_load((other.run / "config.yaml").read_text())
                config["paths"]["output_dir"] = str(again.run)
                plan.config.clear()
                plan.config.update(config)
                with Trial(plan, n_ranks) as trial:
                    outcomes = trial.end()
                check_state(outcomes, expected)  # type: ignore[arg-type]
                assert again.metrics() == other.metrics()
