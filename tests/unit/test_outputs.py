"""The run folder: what is written, how, and what never gets in."""

from __future__ import annotations

import json
import logging
import os
import warnings
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ftlab.outputs import environment
from ftlab.outputs import logs as log_records
from ftlab.outputs.files import append_jsonl
from ftlab.outputs.folder import FolderInUseError, RunFolder, claim, claim_lent, hold, is_held, lent
from ftlab.outputs.logs import setup_logging
from ftlab.outputs.secrets import mask_files, mask_secrets


@pytest.fixture
def run_json(tmp_path):
    return lambda: json.loads((tmp_path / "run.json").read_text())


# --- secrets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID",
     "AWS_SESSION_TOKEN", "DB_PASSWORD", "OPENAI_API_KEY", "MY_SECRET"],
)  # fmt: skip
def test_the_value_of_a_secret_environment_variable_is_masked_wherever_it_stands(name, monkeypatch):
    monkeypatch.setenv(name, "correct-horse-battery")
    hidden = mask_secrets({"a": ["x correct-horse-battery y", ("correct-horse-battery",)]})
    assert hidden == {"a": ["x *** y", ("***",)]}


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://user:pw@host/repo", "https://***@host/repo"),
        ("s3://key:se:cr@et@bucket/x", "s3://***@bucket/x"),
        ("hf_aBcDeFgHiJkLmNoPqRsTuVwX", "***"),
        ("sk-proj-1a2b3c4d5e6f7g8h9i", "***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("ghp_0123456789abcdefghij", "***"),
        ("+hub.api_key=abcdef123", "+hub.api_key=***"),
        ("WANDB_API_KEY: 0123456789abcdef0123456789abcdef01234567", "WANDB_API_KEY: ***"),
        ("{'password': 'hunter22'}", "{'password': '***'}"),
        ("https://host/file?token=abc123def&x=1", "https://host/file?token=***&x=1"),
    ],
)
def test_secrets_are_known_by_their_shape(text, hidden):
    assert mask_secrets(text) == hidden


@pytest.mark.parametrize("key", ["api_key", "token", "PASSWORD", "secret", "hub.access_token", "client_secret"])
def test_what_stands_under_a_name_that_says_secret_is_masked(key):
    assert mask_secrets({key: "x"}) == {key: "***"}
    assert mask_secrets({key: None}) == {key: None}


@pytest.mark.parametrize(
    "ordinary",
    [
        {"tokenizer": {"path": "/models/llama"}, "max_new_tokens": 32, "eos_token": "</s>", "train/tokens": 10},
        {"source": "https://host:8080/a@b", "commit": "0123456789abcdef0123456789abcdef01234567"},
        "loss per token: 0.693147, tokens/s: 51234.5",
        "tokenizer=sentencepiece tokenizer.path=../tokenizer.model",
        "${oc.env:WANDB_API_KEY}",
        "api_key=${oc.env:WANDB_API_KEY}",
        {"prompt": "Label this token: {input}"},
        "Password: {instruction}",
        "task-with-a-long-hyphenated-name",
        "hf_transfer and hf_checkpoint_folder_name_long",
    ],
)
def test_ordinary_values_are_left_alone(ordinary, monkeypatch):
    monkeypatch.setenv("SHORT_TOKEN", "a")
    assert mask_secrets(ordinary) == ordinary


@given(
    st.recursive(
        st.none() | st.integers() | st.text("ab/.: "), lambda x: st.lists(x) | st.dictionaries(st.just("k"), x)
    )
)
def test_masking_keeps_what_holds_no_secret(obj):
    assert mask_secrets(obj) == obj


def test_hydras_own_files_are_masked_in_place_and_only_where_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "correct-horse-battery")
    (tmp_path / "overrides.yaml").write_text("- hub.token=correct-horse-battery\n- optimizer.lr=1e-3\n")
    (tmp_path / "config.yaml").write_text("# a comment that stays\nseed: 0\n")
    mask_files(tmp_path)
    assert yaml.safe_load((tmp_path / "overrides.yaml").read_text()) == ["hub.token=***", "optimizer.lr=1e-3"]
    assert (tmp_path / "config.yaml").read_text() == "# a comment that stays\nseed: 0\n"


# --- files -----------------------------------------------------------------------------------------------


def test_the_written_config_reads_back_with_the_same_values_and_types(tmp_path):
    config = {"lr": 1e-5, "betas": [0.9, 0.95], "name": "1e5", "tag": "007", "null": None, "on": "yes", "ü": "ß\n"}
    RunFolder(tmp_path).write_config(config)
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml")) == config


def test_run_json_tells_the_whole_story_of_a_failed_run(tmp_path, run_json):
    folder = RunFolder(tmp_path)
    folder.start(gpus=["H200"], seed=0)
    assert run_json()["status"] == "running"
    folder.update(steps=3, metrics={"val/loss": float("nan")})
    folder.finish("failed", error=ValueError("cannot read https://me:pw@host"))
    record = run_json()
    assert record["status"] == "failed"
    assert record["error"] == {
        "type": "ValueError",
        "kind": "error",
        "message": "cannot read https://***@host",
    }
    assert (record["seed"], record["steps"], record["metrics"]) == (0, 3, {"val/loss": None})
    assert record["duration_s"] >= 0
    assert record["hardware"]["gpus"] == ["H200"]
    assert record["versions"]["hydra-core"].startswith("1.3")


def test_a_kill_in_the_middle_of_an_update_leaves_the_old_run_json(tmp_path, run_json, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.update(step=1)

    def power_cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(KeyboardInterrupt):
        folder.update(step=2)
    assert run_json() == {"step": 1}


def test_code_state_is_null_where_ftlab_is_no_checkout_of_its_own(tmp_path, monkeypatch):
    elsewhere = str(tmp_path / "site-packages" / "ftlab" / "outputs" / "environment.py")
    monkeypatch.setattr(environment, "__file__", elsewhere)
    assert environment.code_state() == {"commit": None, "dirty": None}


def test_a_claimed_folder_is_nobody_elses_until_its_run_ends(tmp_path):
    claim(tmp_path)
    claim(tmp_path)  # it may look twice
    with pytest.raises(FolderInUseError):
        hold(tmp_path)  # as another process does: a lock is of the opened file
    run = RunFolder(tmp_path)
    run.lock()
    assert is_held(tmp_path)
    run.unlock()
    assert not is_held(tmp_path)
    assert os.listdir(tmp_path) == [".lock"]


def test_a_folder_is_handed_to_a_worker_without_a_moment_in_which_others_get_it(tmp_path):
    claim(tmp_path)
    with lent(tmp_path):
        with pytest.raises(FolderInUseError):
            hold(tmp_path)
        claim_lent(tmp_path)
    worker = RunFolder(tmp_path)
    worker.lock()
    assert is_held(tmp_path)  # though whoever started it is gone
    worker.unlock()
    assert not is_held(tmp_path)


def test_jsonl_rows_are_appended_one_a_line(tmp_path):
    for row in ({"text": "a\nb"}, {"text": "ü"}):
        append_jsonl(tmp_path / "samples.jsonl", [row])
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["a\nb", "ü"]


# --- outputs/latest --------------------------------------------------------------------------------------


def test_latest_points_at_the_newest_run(tmp_path):
    for time in ("10-00-00_a", "11-00-00_b"):
        folder = RunFolder(tmp_path / "outputs" / "2026-11-23" / time)
        folder.link_latest()
        assert (tmp_path / "outputs" / "latest").resolve() == folder.path
    assert os.readlink(tmp_path / "outputs" / "latest") == os.path.join("2026-11-23", "11-00-00_b")


@pytest.mark.parametrize("where", ["my_run", "multirun_outputs/2026-11-23/10-00-00_grid/0_seed=1"])
def test_a_folder_of_another_shape_gets_no_link(tmp_path, where):
    RunFolder(tmp_path / where).link_latest()
    assert not list(tmp_path.rglob("latest"))


def test_a_disk_without_links_stops_nothing(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    RunFolder(tmp_path / "2026-11-23" / "10-00-00_a").link_latest()
    assert not (tmp_path / "latest").exists()


def test_what_the_user_calls_latest_is_left_alone(tmp_path):
    (tmp_path / "latest").mkdir()
    RunFolder(tmp_path / "2026-11-23" / "10-00-00_a").link_latest()
    assert not (tmp_path / "latest").is_symlink()


# --- logs ------------------------------------------------------------------------------------------------


@pytest.fixture
def logs(tmp_path):
    yield lambda rank: setup_logging(tmp_path, rank)
    for name in ("ftlab", "py.warnings"):
        for handler in log_records._handlers:
            logging.getLogger(name).removeHandler(handler)
    logging.captureWarnings(False)


def test_the_log_holds_messages_warnings_and_tracebacks_but_no_secret(tmp_path, logs, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "correct-horse-battery")
    logs(0)
    log = logging.getLogger("ftlab.data")
    log.info("key is %s", "correct-horse-battery")
    try:
        raise ValueError("correct-horse-battery")
    except ValueError:
        log.exception("it broke")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("mind the gap", stacklevel=1)
    text = (tmp_path / "train.log").read_text()
    assert "key is ***" in text
    assert "ValueError: ***" in text
    assert "mind the gap" in text
    assert "correct-horse" not in text + capsys.readouterr().err


def test_other_ranks_write_their_own_log_and_only_warn_on_the_terminal(tmp_path, logs, capsys):
    logs(3)
    logging.getLogger("ftlab").info("quiet")
    logging.getLogger("ftlab").warning("loud")
    assert "quiet" in (tmp_path / "rank3.log").read_text()
    assert capsys.readouterr().err == "[rank 3] loud\n"
    assert not (tmp_path / "train.log").exists()


def test_a_second_run_in_the_same_process_logs_each_line_once(tmp_path, logs):
    logs(0)
    logs(0)
    logging.getLogger("ftlab").info("once")
    assert (tmp_path / "train.log").read_text().count("once") == 1
