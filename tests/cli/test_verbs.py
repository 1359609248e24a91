"""The verbs as a whole: each is offered, and explains itself at once."""

from __future__ import annotations

import subprocess
import sys

from ftlab.cli import VERBS
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
    files = {path.stem for path in (ROOT / "ftlab" / "verbs").glob("*.py")} - {"__init__"}
    assert files == {name.replace("-", "_") for name in VERBS}
    assert all(verb.__name__.endswith(f".{name.replace('-', '_')}") for name, verb in VERBS.items())


def test_no_help_waits_for_torch() -> None:
    said = subprocess.run([sys.executable, "-c", ASK_EACH], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "loaded:"
    assert said.count("usage: ftlab") == 1 + len(VERBS)
