"""R24: command lines and option files with random mistakes in them: answered, never a traceback, never a silent yes.

Everything that ``train.py`` does happens, up to the start of the run.
"""

from __future__ import annotations

import json
import random
import re
import string
from pathlib import Path
from typing import Any

import yaml

from ftlab.config.layers import leaves
from tests.cli.warm import ROOT, Said, Warm
from tests.faults.figures import Figure, trials

CONF = ROOT / "conf"
HANG_S = 20.0  # of a processor's time
WAITS_S = 60.0  # of the clock: on a machine that others use, 10 s of computing were seen to take 21
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name not in ("hydra", "local"))
FILES = sorted(file for group in GROUPS for file in (CONF / group).glob("*.yaml"))
GLOBAL = ("experiment", "debug", "sweep")  # whose files change keys of all groups


def keys_of(file: Path) -> set[str]:
    """The keys that a file of conf/ makes."""
    content = {
        key: value for key, value in yaml.safe_load(file.read_text()).items() if key not in ("defaults", "hydra")
    }
    prefix = "" if file.parent == CONF or file.parent.name in GLOBAL else f"{file.parent.name}."
    return {prefix + key for key, _ in leaves(content)}


KNOWN = set.union(*(keys_of(file) for file in [CONF / "train.yaml", *FILES] if file.parent.name not in GLOBAL))
KEYS = sorted(key for key in KNOWN if not key.endswith("_"))
OF_LOGGERS = {key.rpartition(".")[2] for key in KNOWN if key.startswith("logger.")}
# Mappings whose keys are the user's.
OWN_NAMES = re.compile(r"(dataset\.(column_map|sets)|resume|dataset\.format|dataset\.template)(\.|$)")
VALUES = [
    *("0", "-1", "1", "2.5", "1e-5", "1e400", "nan", "-inf", "true", "no", "null", "None", "''", "' '", "???", "abc"),
    *("[]", "[1,2", "[1,[2,{a:b}]]", "{}", "{a:1}", "{_target_:os.system}", "${seed}", "${", "${oc.env:NOT_THERE}"),
    *("${optimizer.lr}", "${.x}", "${ftlab.unless:1}", "${hydra:run.dir}", "1,2,3", "range(3)", "choice(1,2)", "a=b"),
    *(
        "9" * 400,
        "9" * 5000,
        "x" * 5000,
        "\u00fc\u4e2d\U0001f600",
        "\\",
        "'",
        '"',
        "(",
        "../../x",
        "/",
        "~",
        "\t",
        "a b",
        "#",
        "@",
    ),
    *(
        "0x10",
        "010",
        "12:30",
        "2026-01-01",
        "!!python/name:os.system",
        "&a",
        "*a",
        "- 1",
        "a: b",
        "<<: *x",
        "=",
        ":",
        ",",
    ),
]


class Mutations:
    """Random mistakes, of one trial's own."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def text(self, text: str) -> str:
        """``text`` with a few characters changed, missing, doubled or added."""
        for _ in range(self.rng.choice((1, 1, 2, 5))):
            at = self.rng.randrange(len(text) + 1)
            added = self.rng.choice([*string.printable[:95], "\u00e9", "${", "}", "[", "=", ".", "@", "~", "+"])
            text = self.rng.choice(
                (
                    text[:at] + added + text[at:],
                    text[:at] + text[at + 1 :],
                    text[:at] + added + text[at + 1 :],
                    text[:at],
                )
            )
        return text

    def override(self) -> str:
        """Something like an override."""
        key = self.rng.choice([*KEYS, *GROUPS])
        value = self.rng.choice(VALUES)
        if key in GROUPS and self.rng.random() < 0.7:
            value = self.rng.choice([file.stem for file in FILES if file.parent.name == key])
        match self.rng.randrange(8):
            case 0:
                key = self.text(key)
            case 1:
                return self.text(f"{key}={value}")
            case 2:
                key = self.rng.choice(("+", "++", "~", "hydra.", "-", "--")) + key
            case 3:
                key = self.rng.choice((f"{key}.x", f"{key}.0", f"{key}[0]", key.rpartition(".")[2], key.upper()))
            case 4:
                return self.rng.choice((key, f"{key}=", f"={value}", f"{key}:{value}", f"{key}={value}={value}"))
        return f"{key}={value}"

    def command_line(self) -> list[str]:
        found = [self.override() for _ in range(self.rng.choice((1, 1, 2, 3, 6)))]
        if self.rng.random() < 0.1:
            found.insert(0, self.rng.choice(("-m", "--cfg", "--cfg=job", "--multirun", "-x", "--config-name=nothing")))
        return [text.replace("\0", "") for text in found]

    def file(self, text: str) -> str:
        """A YAML file with a mistake in a line or two."""
        lines = text.splitlines()
        for _ in range(self.rng.choice((1, 1, 2))):
            at = self.rng.randrange(len(lines))
            key, colon, _ = lines[at].partition(":")
            match self.rng.randrange(7):
                case 0:
                    lines[at] = self.text(lines[at])
                case 1:
                    del lines[at]
                case 2:
                    lines.insert(at, self.rng.choice(lines))
                case 3:
                    lines[at] = "  " * self.rng.randrange(1, 4) + lines[at]
                case 4:
                    lines[at] = self.text(key) + lines[at][len(key) :]
                case _:
                    lines[at] = f"{key}{colon or ':'} {self.rng.choice(VALUES)}"
            lines = lines or [""]
        return "\n".join(lines) + "\n"


def mutated(rng: random.Random, folder: Path) -> list[str]:
    """A command line with mistakes, or one that chooses an option whose file has some."""
    make = Mutations(rng)
    if rng.random() < 0.5:
        return make.command_line()
    original = rng.choice(FILES)
    group = original.parent.name
    (folder / "more" / group).mkdir(parents=True)
    (folder / "more" / group / "mine.yaml").write_text(make.file(original.read_text()), encoding="utf-8")
    return ["--config-dir", str(folder / "more"), f"{group}={'[console,mine]' if group == 'logger' else 'mine'}"]


def check(said: Said, typed: list[str]) -> None:
    """What must hold whatever was typed."""
    assert said.cpu_seconds < HANG_S, "it computes without an end"
    assert said.seconds < WAITS_S, "it waits without an end"
    assert said.exit_code in (0, 2), f"exit code {said.exit_code}: {said.stderr[-800:]}"
    assert "Traceback" not in said.stderr + said.stdout, said.stderr[-800:]
    assert "HYDRA_FULL_ERROR" not in said.stderr, said.stderr[-800:]
    if said.exit_code:
        assert said.lines, "it says nothing"
        return
    if any(text.startswith("--cfg") for text in typed):
        return
    for config in (json.loads(line) for line in said.stdout.splitlines() if line.startswith("{")):
        assert unknown(config) == [], "accepted"


def unknown(config: dict[str, Any]) -> list[str]:
    """Keys of an accepted configuration that no file of conf/ makes."""

    def is_known(key: str) -> bool:
        named = re.fullmatch(r"logger\.[\w-]+\.(\w+)", key)  # a logger may be called what it likes
        return key in KNOWN or bool(OWN_NAMES.match(key)) or (named is not None and named[1] in OF_LOGGERS)

    return [key for key, _ in leaves(config) if not is_known(key)]


@trials(few=30, all_=500)
def test_r24_no_mistake_is_swallowed_and_none_shows_a_traceback(n: int, tmp_path: Path) -> None:
    claim = (
        "random mutations of command lines and option files: "
        "no hang > 20 s of computing, no traceback, no unknown key accepted"
    )
    accepted, slowest, longest = 0, 0.0, 0.0
    with Figure("R24", claim) as figure, Warm() as warm:
        for number in range(n):
            (folder := tmp_path / str(number)).mkdir()
            typed = mutated(figure.random(number), folder)
            said = warm("train.py", *typed, cwd=folder, timeout_s=WAITS_S + 10, starts=False)
            accepted += said.exit_code == 0
            slowest, longest = max(slowest, said.seconds), max(longest, said.cpu_seconds)
            with figure.trial(f"{number}: {typed}"):
                check(said, typed)
        figure.remarks.append(
            f"{accepted} of them were no mistakes; slowest {slowest:.1f} s, {longest:.1f} s of a processor"
        )


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    long = "x" * 5000
    paths = ("resume", "init_from", "run_name", "paths.output_dir", "paths.cache_dir", "model.checkpoint")
    commands = [
        *([f"{key}={long}"] for key in (*paths, "tokenizer.path", "hydra.run.dir")),
        ["-m", f"hydra.sweep.dir={long}", "seed=1,2"],
        ["-m", f"sweep.resume={long}"],
        ["dataset=alpaca", f"dataset.source={long}"],
        ["dataset=alpaca", "dataset.source=json", f"dataset.data_files={long}"],
    ]
    with Warm() as warm:
        for typed in commands:
            said = warm("train.py", *typed, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
            check(said, typed)
            assert said.exit_code == 2, typed


def test_a_silent_yes_would_be_seen() -> None:
    loggers = {"mine": {"project": "x", "projekt": "x"}, "wandb.": {"project": "x"}}
    config = {"optimizer": {"lr": 1, "lrr": 2}, "sed": 1, "seed": 1, "dataset": {"column_map": {"x": 1}}}
    wrong = ["optimizer.lrr", "sed", "logger.mine.projekt", "logger.wandb..project"]
    assert unknown(config | {"logger": loggers}) == wrong
