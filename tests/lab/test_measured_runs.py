"""Runs measured after the fact, and compared with what they logged themselves and with transformers."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from ftlab.cli import main
from ftlab.config.build import build
from ftlab.config.check import compose_config
from ftlab.config.resume import overlaid
from ftlab.errors import ConfigError, ConfigErrors
from ftlab.lab.evaluate import MAY_CHANGE, evaluate, evaluate_tasks, runs_and_overrides
from ftlab.lab.runs import RunRecord
from ftlab.lab.summary import summarise
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A few steps on the embedded data, with two checkpoints and an export."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    small = (
        "model.dim=32",
        "model.n_layers=2",
        "model.ffn_hidden_dim=48",
        "optimizer.lr=0.01",
        "evaluation.at_start=false",
    )
    steps = (
        "trainer.max_steps=12",
        "checkpoint.every_steps=6",
        "evaluation.every_steps=6",
        "evaluation.max_new_tokens=4",
    )
    command = [sys.executable, "train.py", f"hydra.run.dir={folder}", "logger=[jsonl]", *small, *steps]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_a_run_measured_again_gives_what_it_logged_itself(run):
    logged = {row["step"]: row for row in RunRecord(run).metrics if "val/loss" in row}
    for address, step, weights in (
        (str(run), 12, "export"),
        (f"{run}@6", 6, "checkpoints/step_00000006"),
    ):
        [found] = evaluate([address])
        assert (found["on"], found["step"], found["weights"], found["rows"]) == ("tiny", step, weights, 240)
        assert found["scores"]["loss"] == pytest.approx(logged[step]["val/loss"], rel=1e-9)
        assert found["scores"]["exact_match"] == logged[step]["val/exact_match"]
        assert len(found["samples"]) == 8
    noted = RunRecord(run).evaluations
    assert [one["step"] for one in noted] == [12, 6]


def test_other_rows_and_worked_answers_are_measured_as_transformers_does(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    draw = random.Random(3)
    pairs = [(draw.randrange(90), draw.randrange(90)) for _ in range(24)]
    rows = [{"instruction": f"What is {a} + {b}?", "output": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in pairs]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = ["dataset=instruct", f"dataset.data_files={tmp_path / 'sums.jsonl'}", "dataset.val_fraction=0.5"]
    changes += ["dataset.source=json", "dataset.column_map.input=null"]
    [found] = evaluate([str(run)], [*changes, "evaluation.max_new_tokens=2"])
    assert found["on"] == "sums.jsonl"
    assert found["scores"]["exact_match"] == 0.0  # two tokens hold no worked answer
    assert found["scores"]["perplexity"] == pytest.approx(math.exp(found["scores"]["loss"]))

    from ftlab.assembly.data import read_data
    from ftlab.lab.trained import open_trained

    trained = open_trained(str(run))
    config = overlaid(trained.config, changes, run, ("dataset.",))
    held_out = read_data(config, trained.tokenizer).validation
    oracle = transformers.AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float64)
    nll, n_targets = 0.0, 0
    for i in range(len(held_out)):
        tokens, trained_on = torch.tensor(held_out.tokens(i).tolist()), torch.tensor(held_out.trained(i).tolist())
        with torch.no_grad():
            log_probs = oracle(tokens[None]).logits[0, :-1].log_softmax(-1)
        picked = log_probs.gather(-1, tokens[1:, None]).squeeze(-1)[trained_on[1:]]
        nll, n_targets = nll - picked.sum().item(), n_targets + len(picked)
    assert len(held_out) == found["rows"] >= 6
    assert found["scores"]["loss"] == pytest.approx(nll / n_targets, rel=1e-5)


def test_several_runs_are_one_table_and_reports_know_the_scores(run, capsys):
    assert main(["evaluate", str(run), f"{run}@6", "evaluation.max_batches=1"]) == 0
    table = capsys.readouterr().out
    assert table.count(run.name) >= 2
    assert "exact_match" in table
    column = summarise([RunRecord(run)]).column("tiny: loss")
    of_its_end, _ = RunRecord(run).evaluations[-2:]
    assert column.cells == [of_its_end["scores"]["loss"]]


def test_what_the_run_settled_cannot_be_changed_and_the_error_says_what_can(run):
    with pytest.raises(ConfigErrors, match=r"optimizer\.lr: was settled by the run .* dataset\.…, evaluation\."):
        evaluate([str(run)], ["optimizer.lr=1"])
    with pytest.raises(ConfigErrors, match=r"did you mean evaluation\.max_batches"):
        evaluate([str(run)], ["evaluation.max_batch=1"])


MIXED = ["dataset=mixture"]
LIMITED = ["dataset.max_samples=40", "dataset.val_fraction=0.25"]
# The second is a key that other sets do not have, the third a column that they do not.
CLEANED = ["dataset=alpaca", "dataset.use_clean=true", "dataset.column_map.instruction=prompt"]
ANSWERS = {"instruction": "prompt", "input": "input", "output": "answer", "family": None}
GSM8K = {"instruction": "question", "input": None, "output": "answer", "family": None}


@pytest.mark.parametrize(
    ("run_with", "noted", "typed", "expected"),
    [
        (LIMITED, LIMITED, "dataset.val_fraction=0.5", {"max_samples": 40, "val_fraction": 0.5}),
        # A set that is chosen is that set, not what the run made of its own.
        (LIMITED, LIMITED, "dataset=tiny", {"source": "tiny", "max_samples": None, "val_fraction": None}),
        (CLEANED, CLEANED, "dataset=gsm8k", {"source": "openai/gsm8k", "column_map": GSM8K}),
        # A key that is given once more is no choice of an option.
        (CLEANED, CLEANED, "dataset.column_map={output:answer}", {"use_clean": True, "column_map": ANSWERS}),
        # Of the default composition these are no difference, of the run they are.
        (LIMITED, None, "dataset=tiny", {"source": "tiny", "max_samples": None, "val_fraction": None}),
        (LIMITED, None, "dataset.max_samples=null", {"max_samples": None, "val_fraction": 0.25}),
        (["dataset=gsm8k"], ["dataset=lost_since"], "dataset=tiny", {"source": "tiny", "subset": None}),
        (MIXED, MIXED, "dataset=tiny", {"source": "tiny", "sets": None, "weights": None}),
        ([], [], "dataset=mixture", {"source": "mixture", "weights": {"a": 3.0, "b": 1.0}, "template": None}),
    ],
)
def test_an_override_is_laid_over_what_the_run_holds(run_with, noted, typed, expected, tmp_path):
    if noted is not None:
        (tmp_path / ".hydra").mkdir()
        (tmp_path / ".hydra" / "overrides.yaml").write_text(json.dumps(noted))
    config = compose_config(run_with)  # with the default loggers: W&B's tags follow the dataset
    dataset = overlaid(config, [typed], tmp_path, MAY_CHANGE)["dataset"]
    assert {key: dataset.get(key) for key in expected} == expected
    assert build(dataset)


def test_a_run_with_options_from_elsewhere_is_measured_with_them(tmp_path):
    (tmp_path / "conf" / "dataset").mkdir(parents=True)
    (tmp_path / "conf" / "dataset" / "mine.yaml").write_text("defaults: [tiny, _self_]\nmax_samples: 50\n")
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text('["dataset=mine"]')
    config, typed = compose_config(["dataset=mine"], extra_dir=tmp_path / "conf"), ["evaluation.max_batches=1"]
    found = overlaid(config, typed, tmp_path, MAY_CHANGE, tmp_path / "conf")
    assert (found["dataset"]["max_samples"], found["evaluation"]["max_batches"]) == (50, 1)


@pytest.mark.parametrize("typed", ["logger=[console]", "run_name=other", "model.dim=64"])
def test_what_the_run_is_called_and_who_hears_of_it_cannot_be_typed(typed, tmp_path):
    with pytest.raises(ConfigErrors, match="was settled by the run"):
        overlaid(compose_config(), [typed], tmp_path, MAY_CHANGE)


def test_folders_with_an_equals_sign_are_runs(tmp_path, monkeypatch):
    (tmp_path / "lr=1").mkdir()
    monkeypatch.chdir(tmp_path)
    given = ["lr=1", "lr=1@best", "dataset=gsm8k", "outputs/latest", "+dataset.x=1", "a/0_lr=2@50"]
    assert runs_and_overrides(given) == (
        ["lr=1", "lr=1@best", "outputs/latest", "a/0_lr=2@50"],
        ["dataset=gsm8k", "+dataset.x=1"],
    )
    with pytest.raises(ConfigError, match="no run is named"):
        runs_and_overrides(["dataset=gsm8k"])


# ---- lm-eval


@pytest.fixture
def local_task(tmp_path):
    """A multiple-choice task whose questions are in a file here."""
    words = ("cold", "up", "yes", "big", "old")
    choices = ["hot", "down", "no"]
    questions = [
        {"question": f"Opposite of {word}?", "choices": choices, "label": i % 3} for i, word in enumerate(words)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    (tmp_path / "opposites.yaml").write_text(
        f"""
task: ftlab_opposites
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "questions.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
    )
    return tmp_path, questions


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra eval is not installed")
def test_lm_eval_reads_the_export_and_scores_as_the_likelihoods_say(run, local_task):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, questions = local_task
    [found] = evaluate_tasks([str(run)], ["ftlab_opposites"], ["device=cpu"], folder)
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")

    def likelihood(question, choice):
        start = tokenizer(question).input_ids
        whole = torch.tensor(tokenizer(f"{question} {choice}").input_ids)
        with torch.no_grad():
            log_probs = model(whole[None]).logits[0, :-1].log_softmax(-1)
        return log_probs.gather(-1, whole[1:, None])[len(start) - 1 :].sum().item()

    right = [
        max(range(3), key=lambda k, one=one: likelihood(one["question"], one["choices"][k])) == one["label"]
        for one in questions
    ]
    assert found["scores"]["acc"] == pytest.approx(sum(right) / len(right))
    assert (found["on"], found["step"]) == ("ftlab_opposites", 12)
    assert RunRecord(run).evaluations[-1]["harness"].startswith("lm-eval ")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra eval is not installed")
def test_an_unknown_task_is_refused(run):
    with pytest.raises(ConfigError, match=r"no_such_task is none of the [\d,]+ that lm-eval"):
        evaluate_tasks([str(run)], ["no_such_task"])


def test_without_lm_eval_the_error_names_the_extra(run, monkeypatch):
    monkeypatch.setattr("ftlab.lab.evaluate.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lm-eval is not installed\n  try: pip install 'ftlab\[eval\]'"):
        evaluate_tasks([str(run)], ["hellaswag"])
