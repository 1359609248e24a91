"""Console, metrics.jsonl and W&B: what each shows, and that none of them can harm a run."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from ftlab.loggers import wandb as wandb_module
from ftlab.loggers.base import RunInfo
from ftlab.loggers.console import ConsoleLogger
from ftlab.loggers.jsonl import JsonlLogger
from ftlab.loggers.wandb import WandbLogger, choose_mode
from ftlab.plots import draw_plots
from tests.wandb_files import items, read_offline_run, rows_of

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def info(tmp_path):
    def make(**changes):
        facts = {
            "folder": tmp_path,
            "run_id": "0a1b2c3d",
            "first_step": 0,
            "logged_until": 0,
            "name": "llama_tiny",
            "config": {"optimizer": {"lr": 1e-3}},
            "seed": 0,
            "total_steps": 200,
            "global_batch_size": 32,
            "model": "llama_tiny",
            "n_params": 3_214_336,
            "weights": None,
            "dataset": "tiny",
            "n_train_samples": 1800,
            "n_val_samples": 200,
            "device": "cpu",
            "precision": "fp32",
            "next_commands": ('ftlab generate outputs/latest "Add 2 and 3."',),
        }
        return RunInfo(**(facts | changes))

    return make


def train(logger, info, *, steps=200, status="completed", summary=None, artifacts=()):
    logger.start(info)
    for step in range(1, steps + 1):
        logger.log({"train/loss": 3.0 / step, "perf/tokens_per_s": 5e4}, step)
        if step % 100 == 0:
            logger.log({"val/loss": 4.0 / step, "val/perplexity": 1.5, "val/exact_match/add": step / 200}, step)
    sample = {"sample_id": 7, "prompt": "### Instruction:\nAdd 2 and 3.\n\n### Response:\n", "generated": "5"}
    logger.log_samples([sample | {"reference": "5", "family": "add", "correct": True}], steps)
    logger.finish(status, summary or {}, list(artifacts))


# --- console ---------------------------------------------------------------------------------------------


def test_without_a_terminal_a_run_prints_a_few_dozen_plain_lines(info, capsys):
    train(ConsoleLogger(), info(total_steps=2000), steps=2000)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("step") and "validation" not in line]
    assert lines[0].startswith("step    1/2000  loss 3.000")
    assert lines[-1].startswith("step 2000/2000")
    assert 20 <= len(lines) <= 25
    assert "\x1b" not in out


def test_random_weights_are_said_loudly_and_pretrained_ones_by_name(info, capsys):
    ConsoleLogger().start(info())
    assert "RANDOM" in capsys.readouterr().out
    ConsoleLogger().start(info(weights="/ckpt/Llama-2-7b"))
    out = capsys.readouterr().out
    assert "/ckpt/Llama-2-7b" in out
    assert "RANDOM" not in out


def test_the_closing_table_says_how_it_went_where_things_are_and_what_to_type_next(info, capsys, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    train(ConsoleLogger(), info(), summary={"perf/tokens_per_s": 48_123.0})
    closing = capsys.readouterr().out.split("llama_tiny · completed")[1]
    for fact in ("exact match add  100%", "3.0000 -> 0.0150  (-100%)", "0.0400 -> 0.0200  (-50%)", "48,123 tokens/s",
                 "Add 2 and 3. → 5 ✓", str(tmp_path), "metrics.jsonl", 'ftlab generate outputs/latest'):  # fmt: skip
        assert fact in closing


def test_a_failed_run_suggests_no_next_command(info, capsys):
    train(ConsoleLogger(), info(), status="failed")
    assert "ftlab generate" not in capsys.readouterr().out


def test_a_run_that_fails_before_its_first_step_closes_properly(info, capsys):
    logger = ConsoleLogger()
    logger.start(info())
    logger.finish("failed", {}, [])
    assert "llama_tiny · failed" in capsys.readouterr().out


def test_on_a_terminal_there_is_a_bar_with_loss_speed_and_time_left(info):
    logger = ConsoleLogger()
    screen = io.StringIO()
    logger._console = Console(file=screen, force_terminal=True, width=120, highlight=False)
    train(logger, info(), steps=150)
    last_line = screen.getvalue().split("llama_tiny · ")[0].split("\r")[-1]
    for part in ("150/200", "loss 0.020", "val 0.040", "50,000 tokens/s", "ETA 0:0"):
        assert part in last_line


def test_a_path_longer_than_the_line_stays_in_one_piece(info, capsys):
    folder = Path("/data") / ("long" * 40)
    ConsoleLogger().start(info(folder=folder))
    assert str(folder) in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_tokenisation_shows_its_progress(terminal):
    logger = ConsoleLogger()
    screen = io.StringIO()
    logger._console = Console(file=screen, force_terminal=terminal, width=100)
    with logger.progress("tokenising", total=999) as advance:
        advance(999)
    assert ("999/999" if terminal else "tokenising: 999 in 0.0 s") in screen.getvalue()


# --- metrics.jsonl ---------------------------------------------------------------------------------------


def test_every_metric_line_is_strict_json_and_on_disk_at_once(info, tmp_path):
    logger = JsonlLogger()
    logger.start(info())
    logger.log({"train/loss": float("inf"), "train/lr": 1e-3}, 3)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before finish()
    expected = {"step": 3, "train/loss": None, "train/lr": 1e-3, "non_finite": {"train/loss": "inf"}}
    assert json.loads(line, parse_constant=refuse) == expected


def test_samples_carry_their_step(info, tmp_path):
    train(JsonlLogger(), info(), steps=5)
    (row,) = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    assert (row["step"], row["sample_id"], row["generated"], row["correct"]) == (5, 7, "5", True)


# --- W&B: which mode -------------------------------------------------------------------------------------


@pytest.fixture
def no_wandb_settings(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # the logger sets it, too; this puts it back


@pytest.fixture
def server():
    """Answers every request with 401, as W&B does to a wrong key."""

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(401)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()


def test_without_a_key_it_is_offline(no_wandb_settings):
    assert choose_mode() == ("offline", "no API key")


@pytest.mark.parametrize(("asked", "mode"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled")])
def test_the_mode_asked_for_counts(no_wandb_settings, monkeypatch, asked, mode):
    monkeypatch.setenv("WANDB_MODE", asked)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert choose_mode()[0] == mode


def test_a_mode_that_does_not_exist_means_offline(no_wandb_settings, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "banana")
    mode, reason = choose_mode()
    assert mode == "offline"
    assert "banana" in reason


def test_with_a_key_and_a_server_that_answers_it_is_online(no_wandb_settings, monkeypatch, server):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server)
    assert choose_mode() == ("online", "")


def test_a_key_in_netrc_counts(no_wandb_settings, monkeypatch, server, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {server.removeprefix('http://')} login user password {KEY}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("WANDB_BASE_URL", server)
    assert choose_mode() == ("online", "")


def test_a_server_that_does_not_answer_is_given_up_within_seconds(no_wandb_settings, monkeypatch):
    monkeypatch.setattr(wandb_module, "_REACH_TIMEOUT_S", 0.3)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert choose_mode() == ("offline", "127.0.0.1 is out of reach")
        assert time.monotonic() - started < 1.5


# --- W&B: it cannot harm a run ---------------------------------------------------------------------------


@pytest.fixture
def wandb_logger(no_wandb_settings):
    return WandbLogger(project="ftlab", entity=None, group="grid", job_type="job", tags=["a", "b"])


def warnings_of(caplog):
    """Ours: W&B writes a diary of its own, which users do not see."""
    ours = (record for record in caplog.records if record.name.partition(".")[0] == "ftlab")
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


def stand_in(monkeypatch, init):
    fake = types.SimpleNamespace(init=init, setup=lambda _: None, Settings=lambda **_: None, teardown=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)


def test_a_wandb_that_cannot_be_imported_costs_one_line(wandb_logger, info, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(wandb_logger, info())
    (line,) = warnings_of(caplog)
    assert line.startswith("W&B: ModuleNotFoundError")


def test_a_wandb_that_calls_exit_costs_one_line(wandb_logger, info, monkeypatch, caplog):
    stand_in(monkeypatch, lambda **_: sys.exit(1))
    train(wandb_logger, info())
    (line,) = warnings_of(caplog)
    assert "the run goes on without it" in line


def test_a_wandb_that_hangs_delays_neither_a_step_nor_the_end(wandb_logger, info, monkeypatch, caplog):
    woken = threading.Event()
    stand_in(monkeypatch, lambda **_: woken.wait(60))
    monkeypatch.setattr(wandb_module, "_REACH_TIMEOUT_S", 0.1)
    wandb_logger._finish_timeout_s = 0.2
    started = time.monotonic()
    train(wandb_logger, info())
    assert time.monotonic() - started < 1.0
    assert len(warnings_of(caplog)) == 1
    woken.set()


def test_a_wandb_that_falls_behind_is_left_behind(no_wandb_settings, info, monkeypatch, caplog):
    woken = threading.Event()
    stand_in(monkeypatch, lambda **_: woken.wait(60))
    monkeypatch.setattr(wandb_module, "_QUEUE_LENGTH", 50)
    monkeypatch.setattr(wandb_module, "_REACH_TIMEOUT_S", 0.1)
    logger = WandbLogger(project="ftlab", entity=None, group=None, job_type=None, tags=[])
    logger._finish_timeout_s = 0.1
    train(logger, info())
    assert warnings_of(caplog) == ["W&B: no longer answers; the run goes on without it"]
    woken.set()


def test_disabled_means_that_wandb_is_not_even_imported(wandb_logger, info, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail, and say so
    train(wandb_logger, info())
    assert not (tmp_path / "wandb").exists()


def test_a_killed_wandb_process_costs_one_line(wandb_logger, info, caplog):
    caplog.set_level(logging.INFO, "ftlab")
    wandb_logger.start(info())
    wandb_logger.log({"train/loss": 1.0}, 1)
    deadline = time.monotonic() + 20
    while "W&B: offline" not in caplog.text:
        assert time.monotonic() < deadline, "W&B did not start"
        time.sleep(0.02)
    (core,) = (child for child in psutil.Process().children() if child.name() == "wandb-core")
    core.kill()
    for step in range(2, 50):
        wandb_logger.log({"train/loss": 1.0}, step)
    wandb_logger.finish("completed", {}, [])
    (line,) = warnings_of(caplog)
    assert "the run goes on without it" in line


def test_a_refused_key_means_offline_and_the_run_is_recorded(wandb_logger, info, monkeypatch, server, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server)
    train(wandb_logger, info(), steps=3)
    assert len(rows_of(read_offline_run(tmp_path))) == 4


# --- W&B: what an offline run holds ----------------------------------------------------------------------


@pytest.fixture
def offline_run(wandb_logger, info, tmp_path, monkeypatch):
    """A whole run with secrets in every place that W&B could take them from."""
    canaries = {"HF_TOKEN": "canary-in-hf-token", "WANDB_API_KEY": KEY, "AWS_SECRET_ACCESS_KEY": "canary-in-aws"}
    for name, value in (canaries | {"WANDB_MODE": "offline"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", "hub.password=canary-in-argv"])
    config = {
        "optimizer": {"lr": 1e-3},
        "source": "https://me:canary-in-url@host/data.json",
        "hub": {"api_key": "canary-in-config", "note": "canary-in-hf-token"},
    }
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    final = {"val/loss": 0.02, "note": "canary-in-aws"}
    train(wandb_logger, info(config=config), summary=final, artifacts=draw_plots(tmp_path))
    return read_offline_run(tmp_path)


def test_an_offline_run_reads_back_complete_and_without_a_secret(offline_run, tmp_path, capfd):
    by_type = {record.WhichOneof("record_type"): record for record in offline_run}
    rows = rows_of(offline_run)

    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(step, 3.0 / step) for step in range(1, 201)]
    assert [row["step"] for row in rows if "val/loss" in row] == [100, 200]
    assert any(row.get("samples/_type") == "table-file" for row in rows)
    assert any(row.get("plots/loss/_type") == "image-file" for row in rows)

    run = by_type["run"].run
    assert (run.project, run.run_group, run.display_name, list(run.tags)) == ("ftlab", "grid", "llama_tiny", ["a", "b"])
    config = items(run.config.update)
    assert config["optimizer.lr"] == 1e-3, "flat: a column each, under the name that one types"
    assert config["source"] == "https://***@host/data.json"
    assert (config["hub.api_key"], config["hub.note"]) == ("***", "***")

    summary = {}
    for record in offline_run:
        if record.WhichOneof("record_type") == "summary":
            summary |= items(record.summary.update)
    assert (summary["val/loss"], summary["status"], summary["n_params"]) == (0.02, "completed", 3_214_336)
    metrics = [r.metric for r in offline_run if r.WhichOneof("record_type") == "metric"]
    assert [(metric.glob_name, metric.step_metric) for metric in metrics if metric.glob_name] == [("*", "step")]
    assert by_type["exit"].exit.exit_code == 0

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        assert b"canary" not in content, path
        assert KEY.encode() not in content, path
    assert capfd.readouterr().out == ""
