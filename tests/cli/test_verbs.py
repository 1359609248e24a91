"""The verbs as a whole: each is offered, and explains itself at once."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from ftlab.cli import VERBS, main
from tests.conftest import ROOT

HEAVY = {"torch", "numpy", "hydra", "omegaconf", "rich", "yaml"}
ASK_EACH = f"""
import sys
from ftlab.cli import VERBS, main
for words in ([], *([verb] for verb in VERBS)):
    try:
        main([*words, "--help"])
    except SystemExit as end:
        assert end.code == 0, words
print("loaded:", *({HEAVY} & set(sys.modules)))
"""


def test_every_file_of_verbs_is_a_verb_under_its_own_name() -> None:
    files = {path.stem for path in (ROOT / "ftlab" / "verbs").glob("*.py")} - {"__init__", "_types"}
    assert files == {name.replace("-", "_") for name in VERBS}
    assert all(verb.__name__.endswith(f".{name.replace('-', '_')}") for name, verb in VERBS.items())


def test_no_help_waits_for_torch() -> None:
    said = subprocess.run([sys.executable, "-c", ASK_EACH], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "loaded:"
    assert said.count("usage: ftlab") == 1 + len(VERBS)


@pytest.mark.parametrize(
    ("typed", "taken"),
    [
        ("ls a --json status=completed", {"words": ["a", "status=completed"], "json": True}),
        ("plan model=llama2_7b --rows 10 dataset=alpaca", {"overrides": ["model=llama2_7b", "dataset=alpaca"]}),
        ("from-torchtune 7B.yaml a=1 --nproc-per-node 2 b=2", {"overrides": ["a=1", "b=2"], "nproc_per_node": 2}),
        ("evaluate a --limit 3 b", {"runs": ["a", "b"], "limit": 3}),
        ("generate a --seed 1 hi", {"run": "a", "prompt": "hi", "seed": 1}),
        ("generate --seed 1 a -- -hi", {"run": "a", "prompt": "-hi", "seed": 1}),
        ("report a --watch", {"watch": 10.0}),
        *(
            (f"{verb} a=1 --config-dir . b=2", {"overrides": ["a=1", "b=2"], "config_dir": Path()})
            for verb in ("plan", "check-data", "verify-resume", "verify-parallel")
        ),
        ("evaluate RUN --config-dir . a=1", {"runs": ["RUN", "a=1"], "config_dir": Path()}),
    ],
)
def test_options_may_stand_anywhere(typed, taken, monkeypatch):
    verb, *words = typed.split()
    seen: list[Namespace] = []
    monkeypatch.setattr(VERBS[verb], "run", seen.append)
    assert main([verb, *words]) == 0
    assert {key: getattr(seen[0], key) for key in taken} == taken


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        *((f"plan --rows {bad}", f"--rows: must be at least 1, got {bad}") for bad in ("0", "-5")),
        ("plan --rows many", "--rows: must be a whole number, got 'many'"),
        ("plan --row-tokens 0", "--row-tokens: must be above 0, got 0"),
        ("plan --tokens-per-s 0", "--tokens-per-s: must be above 0, got 0"),
        ("plan --tokens-per-s nan", "--tokens-per-s: must be a number, got 'nan'"),
        ("plan --tokens-per-s no/such", "--tokens-per-s: no/such is no run's folder: it has no run.json"),
        ("plan --memory-gib -1", "--memory-gib: must be above 0, got -1"),
        ("plan --price-per-hour -1", "--price-per-hour: must be at least 0, got -1"),
        ("report outputs --watch -1", "--watch: must be above 0, got -1"),
        ("generate a hi --max-new-tokens -3", "--max-new-tokens: must be at least 1, got -3"),
        ("generate a hi --temperature -1", "--temperature: must be at least 0, got -1"),
        ("generate a hi --top-p 1.5", "--top-p: must be above 0 and at most 1, got 1.5"),
        (f"generate a hi --seed {2**63}", "--seed: must be below 2**63"),
        ("verify-resume --steps 1", "--steps: must be at least 2, got 1"),
    ],
)
def test_a_number_that_cannot_be_is_refused_in_words(typed, says, capsys):
    with pytest.raises(SystemExit) as end:
        main(typed.split())
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_verbs_find_options_outside_of_conf(tmp_path, capsys):
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("defaults: [sgd, _self_]\nlr: 0.125\n")
    outside = ["optimizer=mine", "--config-dir", str(tmp_path), "device=cpu", "dataset.max_samples=40"]
    assert main(["explain", "optimizer.lr", *outside]) == 0
    assert "optimizer.lr = 0.125" in capsys.readouterr().out
    assert main(["plan", *outside]) == 0
    assert main(["check-data", *outside, "--out", str(tmp_path / "out")]) == 0
    with pytest.raises(SystemExit):
        main(["plan", "--config-dir", str(tmp_path / "absent")])
    assert f"--config-dir: there is no folder {tmp_path / 'absent'}" in capsys.readouterr().err
