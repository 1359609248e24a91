"""S11: a secret that a run is given stays out of everything that it leaves behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.cli.bad_input import SMALL
from tests.cli.warm import Warm
from tests.faults.figures import Figure, trials

# Twelve canaries: of environment variables, which are known by their names, and of shapes that are known by themselves.
IN_ENVIRONMENT = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "canary-of-the-hub-token",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/canary",
    "AWS_ACCESS_KEY_ID": "canary-of-the-access-key-id",
    "AWS_SESSION_TOKEN": "canary-of-the-session-token",
    "OPENAI_API_KEY": "canary-of-the-openai-key",
    "DB_PASSWORD": "canary-of-the-data-base",
}
BY_SHAPE = {
    "https://canary-user:canary-pw@host.example/x": "canary-pw",
    "hf_CanaryCanaryCanary0123": "hf_CanaryCanaryCanary0123",
    "sk-proj-canary-0123456789": "sk-proj-canary-0123456789",
    "AKIACANARY0123456789": "AKIACANARY0123456789",
    "ghp_canary0123456789ABCDEF": "ghp_canary0123456789ABCDEF",
}
CANARIES = [*IN_ENVIRONMENT.values(), *BY_SHAPE.values()]

SINKS: dict[str, Callable[[str], bool]] = {
    "saved config": lambda name: bool(re.fullmatch(r"run/config\.yaml|run/data_.*|run/plots/.*", name)),
    ".hydra": lambda name: name.startswith("run/.hydra/"),
    "logs": lambda name: bool(re.fullmatch(r"run/.*(\.log|\.jsonl)|std(out|err)-.*|run/ledger/.*|run/\.lock", name)),
    "run.json": lambda name: name == "run/run.json",
    "wandb": lambda name: name.startswith("run/wandb/"),
    "checkpoint and export": lambda name: name.startswith(("run/checkpoints/", "run/export/")),
}


@trials(few=72, all_=72)
def test_s11_no_secret_is_written_anywhere(n: int, tmp_path: Path) -> None:
    texts = [*IN_ENVIRONMENT.values(), *BY_SHAPE]
    quoted = ",".join(f"'x {text} y'" for text in texts)
    given = (f"logger.wandb.tags=[{quoted}]", f"logger.wandb.group='{' '.join(BY_SHAPE)}'", f"run_name='{texts[1]}'")
    where = {name: str(tmp_path / name.lower()) for name in ("TMPDIR", "FTLAB_CACHE_DIR", "HOME", "WANDB_CACHE_DIR")}
    for folder in where.values():
        Path(folder).mkdir()
    env = IN_ENVIRONMENT | where | {"WANDB_MODE": "offline"}
    commands = {
        0: ["train.py", *SMALL, *given, "paths.output_dir=run", "dataset.val_fraction=0.2"],
        1: ["train.py", "resume=run", "trainer.max_steps=4", f"logger.wandb.tags=[{quoted},more]"],
        2: ["train.py", f"model.checkpoint='./{texts[-1]}'", f"run_name='{texts[-2]}'"],  # wrong: said on the terminal
    }
    with Figure("S11", "12 secrets × 6 sinks of a run, one resumed and one refused: absent") as figure:
        with Warm() as warm:
            for number, command in commands.items():
                said = warm(*command, cwd=tmp_path, env=env)
                assert said.exit_code == (2 if number == 2 else 0), said.stderr
                (tmp_path / f"stdout-{number}").write_text(said.stdout)
                (tmp_path / f"stderr-{number}").write_text(said.stderr)
        files = {str(file.relative_to(tmp_path)): file for file in tmp_path.rglob("*") if file.is_file()}
        contents = {name: file.read_bytes() for name, file in files.items()}
        assert b"***" in contents["run/config.yaml"] + contents["run/run.json"], "nothing was planted"
        for sink, belongs in SINKS.items():
            names = [name for name in contents if belongs(name)]
            for canary in CANARIES:
                with figure.trial(f"{canary} in {sink}"):
                    assert names, "no such file"
                    assert [name for name in names if canary.encode() in contents[name] or canary in name] == []
        assert figure.n == n
        known = [name for name in contents if any(belongs(name) for belongs in SINKS.values())]
        assert {name.split("/")[0] for name in contents.keys() - known} <= {name.lower() for name in where}
        elsewhere = {name: content for name, content in contents.items() if name not in known}
        assert [name for name, content in elsewhere.items() for canary in CANARIES if canary.encode() in content] == []
