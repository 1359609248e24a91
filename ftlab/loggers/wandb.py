"""Weights & Biases: shows the run, and can neither stop it nor slow it.

Everything W&B does, from importing it to the last upload, happens on one background thread that is fed by a
queue. The training thread only ever puts into that queue, and waits once: at the end, for a bounded time.
Any failure costs one line on the terminal, and W&B for the rest of the run; nothing else.
"""

from __future__ import annotations

import http.client
import logging
import netrc
import os
import queue
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from ftlab.loggers.base import RunInfo
from ftlab.outputs.files import shortest
from ftlab.outputs.folder import Status
from ftlab.outputs.secrets import mask_secrets
from ftlab.storage.checkpoints import less_is_better

_log = logging.getLogger(__name__)

_REACH_TIMEOUT_S = 3.0  # to find out whether the server answers at all
_INIT_TIMEOUT_S = 10.0  # W&B's own default, 90 s, is for people who wait for it; nobody waits here
_UPLOAD_TIMEOUT_S = 20.0  # at the end; what is not uploaded by then stays on disk, for `wandb sync`
_FINISH_TIMEOUT_S = _INIT_TIMEOUT_S + _UPLOAD_TIMEOUT_S + 5.0
_OFFLINE_FINISH_TIMEOUT_S = 10.0  # to write to the local disk
_QUEUE_LENGTH = 10_000  # log calls; a W&B that falls so far behind has stopped
# Of the folder, into W&B's files: what was trained on, and what exactly came out; of a sweep, what became of its jobs.
_ATTACHED = ("config.yaml", "data_report.json", "data_check.html", "export/MANIFEST.json", "sweep.json", "summary.csv")
_REPORT = "report.html"  # shown in the workspace
_MODES = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}


class WandbLogger:
    """Online with an API key and a server in reach, otherwise offline into ``<run folder>/wandb``.

    ``WANDB_MODE``, ``WANDB_BASE_URL`` and ``WANDB_API_KEY`` (or netrc) count as they do for W&B itself.

    Args:
        entity: user or team; None: the key's own.
        group: W&B draws the runs of one group together; None: no group.
        job_type: W&B's second level below groups.
    """

    def __init__(
        self, *, project: str, entity: str | None, group: str | None, job_type: str | None, tags: Sequence[str]
    ):
        identity = {"project": project, "entity": entity, "group": group, "job_type": job_type, "tags": list(tags)}
        self._identity: dict[str, Any] = mask_secrets(identity)
        self._best: dict[str, float] = {}  # the best value of the metric that decides, and its step
        self._jobs: queue.Queue[Callable[[Any], None] | None] = queue.Queue(_QUEUE_LENGTH)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._off = threading.Event()
        self._finish_timeout_s = _FINISH_TIMEOUT_S
        self._step = 0  # the newest one logged

    # --- on the training thread: put into the queue, nothing more --------------------------------------

    def start(self, info: RunInfo) -> None:
        self._info = info
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        # `step` travels as a metric, and is every chart's x axis. W&B's own step counter only ever grows by
        # one: it would refuse validation metrics that arrive for a step that was logged already.
        self._step = step
        self._note_best(metrics, step)
        if step > self._info.logged_until:  # W&B was told of the others before the run was cut back
            row = {"step": step, **metrics}
            self._put(lambda run: run.log(row))

    def _note_best(self, metrics: Mapping[str, float], step: int) -> None:
        name = self._info.config.get("evaluation", {}).get("metric", "val/loss")
        if step and name in metrics:  # before the first step nothing has been learnt
            sign = 1 if less_is_better(name) else -1
            if sign * metrics[name] < sign * self._best.get(f"best/{name}", sign * float("inf")):
                self._best = {f"best/{name}": metrics[name], "best/step": step}

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        rows = [dict(sample) for sample in samples]

        def send(run: Any) -> None:
            import wandb

            columns = list(dict.fromkeys(key for row in rows for key in row))
            data = [[row.get(column) for column in columns] for row in rows]
            # Mixed types: `correct` and `family` may be None in some rows.
            run.log({"step": step, "samples": wandb.Table(columns, data, allow_mixed_types=True)})

        self._put(send)

    def finish(self, status: Status, summary: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        def send(run: Any) -> None:
            import wandb

            pictures = {f"plots/{path.stem}": wandb.Image(str(path)) for path in artifacts if path.suffix == ".png"}
            if pictures:
                run.log({"step": self._step, **pictures})
            for name in _ATTACHED:
                if (path := self._info.folder / name).is_file():
                    run.save(str(path), base_path=str(self._info.folder), policy="now")
            report = self._info.folder / _REPORT
            if report.is_file():
                run.log({"step": self._step, "report": wandb.Html(report.read_text(encoding="utf-8"), inject=False)})
            facts = {"status": status} | ({"n_params": self._info.n_params} if self._info.n_params else {})
            run.summary.update(mask_secrets({**summary, **self._best, **facts}))
            run.finish(exit_code=0 if status == "completed" else 1)

        self._put(send)
        self._put(None)
        self._thread.join(self._finish_timeout_s)
        if self._thread.is_alive():
            self._give_up("did not finish in time")
            # The interpreter would wait at exit for W&B's own process, and without a limit. Once that is
            # gone, whatever call hangs in it fails and the thread can clear up.
            _kill_service()
            self._thread.join(_REACH_TIMEOUT_S)

    def _put(self, job: Callable[[Any], None] | None) -> None:
        if not self._off.is_set():
            try:
                self._jobs.put_nowait(job)
            except queue.Full:
                self._give_up("no longer answers")

    def show_sweep(self, folder: Path, sweep_id: str, summary: Mapping[str, Any]) -> None:
        """A sweep's report, its table and its record, as one more run of its group."""
        self._identity["job_type"] = "report"
        nothing: dict[str, Any] = dict.fromkeys(one.name for one in fields(RunInfo))
        facts = {"folder": folder, "run_id": sweep_id, "name": f"report {folder.name}", "config": {}, "logged_until": 0}
        self.start(RunInfo(**nothing | facts))
        self.finish("completed", summary, [])

    # --- on the background thread ----------------------------------------------------------------------

    def _work(self) -> None:
        try:
            run = self._init()
            while run is not None and (job := self._jobs.get()) is not None:
                job(run)
        except BaseException as error:  # SystemExit, too: a library's exit is no reason for ours
            self._give_up(_first_line(error))
        finally:
            self._off.set()
            with suppress(BaseException):
                # Here, where time is bounded, instead of at the interpreter's exit.
                sys.modules["wandb"].teardown()

    def _init(self) -> Any | None:
        mode, reason = choose_mode()
        if mode == "disabled":
            return None
        # W&B's reports on itself: without a network they hold up the interpreter's exit for ten seconds and
        # complain onto the terminal, and tracebacks are the user's to share.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        logging.getLogger("wandb").addFilter(_let_its_diary_fail)
        settings = wandb.Settings(silent=True, x_service_wait=_INIT_TIMEOUT_S)
        wandb.setup(settings)
        if mode == "online":
            try:
                run = self._init_run("online")
                _log.info("W&B: %s", run.url)
                return run
            except Exception as error:
                reason = f"the server refused ({_first_line(error)})"
                wandb.teardown()  # W&B's own process holds the run's id, and would refuse it to the next
                wandb.setup(settings)
        run = self._init_run("offline")
        self._finish_timeout_s = _OFFLINE_FINISH_TIMEOUT_S
        _log.info("W&B: offline, %s; upload later: wandb sync %s", reason, shortest(Path(run.dir).parent))
        return run

    def _init_run(self, mode: str) -> Any:
        import wandb

        settings = wandb.Settings(
            mode=mode,
            root_dir=str(self._info.folder),
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=_UPLOAD_TIMEOUT_S,
            silent=True,
            # What would carry secrets out: the command line, the terminal, code and git remotes.
            x_disable_meta=True,
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,
        )
        # Offline, `wandb sync` puts together the folders of one id.
        again: dict[str, Any] = {"resume": "allow"} if mode == "online" else {}
        whose = self._identity | {"id": self._info.run_id, "name": self._info.name}
        if os.environ.get("WANDB_SWEEP_ID"):
            # An agent of W&B Sweeps started this run, and waits for the one it has named, in the project of the sweep.
            whose = {key: value for key, value in whose.items() if key not in ("id", "name", "project", "entity")}
        run = wandb.init(**whose, **again, config=flat(mask_secrets(self._info.config)), settings=settings)
        run.define_metric("*", step_metric="step")
        return run

    def _give_up(self, problem: str) -> None:
        if not self._off.is_set():
            self._off.set()
            _log.warning("W&B: %s; the run goes on without it", problem)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optimizer.lr": 0.001}``: a column each in W&B's table, under the names that one types and that sweeps use."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def choose_mode() -> tuple[str, str]:
    """``online``, ``offline`` or ``disabled``, and why; takes about ``_REACH_TIMEOUT_S`` at most."""
    asked = os.environ.get("WANDB_MODE", "online")
    if asked not in _MODES:
        os.environ["WANDB_MODE"] = "offline"  # W&B cannot even be imported with a mode that it does not know
        return "offline", f"WANDB_MODE={asked!r} is none of {', '.join(_MODES)}"
    mode = _MODES[asked]
    if mode != "online":
        return mode, f"as WANDB_MODE={asked} asks"
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not _has_key(url):
        return "offline", "no API key"
    return ("online", "") if _reachable(url) else ("offline", f"{urlsplit(url).hostname} is out of reach")


def _has_key(url: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        path = os.environ.get("NETRC") or Path("~/.netrc").expanduser()
        return netrc.netrc(path).authenticators(urlsplit(url).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _reachable(url: str) -> bool:
    """Whether anything at all answers there in time, through the proxy if one is set."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=_REACH_TIMEOUT_S).close()
        except urllib.error.HTTPError:
            pass  # an answer; what it means is W&B's to find out
        except (OSError, ValueError, http.client.HTTPException) as error:
            # W&B trusts other certificates than Python may: that, too, is for W&B to find out.
            if not isinstance(getattr(error, "reason", None), ssl.SSLError):
                return
        answered.set()

    # On a thread of its own, because looking up a name has no timeout.
    attempt = threading.Thread(target=ask, daemon=True)
    attempt.start()
    attempt.join(_REACH_TIMEOUT_S)
    return answered.is_set()


def _kill_service() -> None:
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()


def _let_its_diary_fail(record: logging.LogRecord) -> bool:  # noqa: ARG001
    """A filter that lets every record pass, on its way to files that a full disk may end.

    W&B keeps a diary beside each run; for every line of it that cannot be written, Python would put a traceback onto
    the terminal.
    """
    for handler in logging.getLogger("wandb").handlers:
        handler.handleError = lambda record: None  # type: ignore[method-assign]  # noqa: ARG005
    return True


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
