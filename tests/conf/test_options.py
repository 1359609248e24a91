"""Every option of every group, found by looking into conf/: it composes, it fits its target, no key of it is dead."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ftlab.config.check import compose_config
from ftlab.config.compose import CONF
from ftlab.config.layers import leaves
from ftlab.config.targets import CONTROL, locate, nodes, parameter_name
from ftlab.errors import ConfigErrors

PACKAGE = CONF.parent / "ftlab"
OPTIONS = sorted(
    f"{file.parent.name}={file.stem}"
    for file in CONF.glob("*/*.yaml")
    if file.parent.name not in ("hydra", "local")  # Hydra's own keys, and this machine's own values
)


@cache
def composed(option: str) -> dict[str, Any]:
    """The checked configuration with ``option``; values that only a user can know are filled in."""
    try:
        return compose_config([option])
    except ConfigErrors as errors:
        missing = [p.key for p in errors.problems if "must be given" in p.problem or "got null" in p.problem]
        given = [f"{key}=name_on_the/hub" for key in missing]
        # Some options go with another only, and say with which.
        needed = [p.fix for p in errors.problems if p.fix in OPTIONS]
        if not given and not needed:
            raise
        return compose_config([option, *given, *needed])


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_fits_its_target(option: str) -> None:
    assert composed(option)


@pytest.mark.parametrize("option", OPTIONS)
def test_no_key_is_dead(option: str) -> None:
    assert list(dead_keys(composed(option))) == []


@pytest.mark.parametrize("option", OPTIONS)
def test_a_default_lives_in_yaml_only(option: str) -> None:
    for key, node in nodes(composed(option)):
        if node["_target_"].startswith("ftlab."):
            parameters = inspect.signature(locate(node["_target_"], key)).parameters
            given = [parameter_name(name) for name in node if name not in CONTROL]
            twice = [name for name in given if parameters[name].default is not inspect._empty]
            assert twice == [], f"{node['_target_']} repeats the default of {twice}"


# ------------------------------------------------------------------------------------- what reads a key


def dead_keys(config: dict[str, Any]) -> Iterator[str]:
    """The keys that nothing reads: no parameter of a target, or one whose value goes nowhere."""
    inside = set()
    for key, node in nodes(config):
        target = locate(node["_target_"], key)
        for name in node.keys() - CONTROL:
            inside.add(f"{key}.{name}")
            parameter = parameter_name(name)
            if parameter not in inspect.signature(target).parameters or not is_read(target, parameter):
                yield f"{key}.{name}"
    for key, _ in leaves(config):
        known = any(key == name or key.startswith(f"{name}.") for name in inside)
        if not known and key.rpartition(".")[2] not in CONTROL and not read_by_name(key):
            yield key


def is_read(target: type, name: str) -> bool:
    """Whether the value of parameter ``name`` is used; torch's own classes are trusted to."""
    if not target.__module__.startswith("ftlab."):
        return True
    if dataclasses.is_dataclass(target):
        return name in attributes_read()
    body = ast.parse(textwrap.dedent(inspect.getsource(target.__init__)))  # type: ignore[misc]
    uses = [n for n in ast.walk(body) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]
    keeps = [n for n in ast.walk(body) if isinstance(n, ast.Assign) and n.value in uses]
    kept_as = {t.attr for keep in keeps for t in keep.targets if isinstance(t, ast.Attribute)}
    return len(uses) > len(keeps) or bool(kept_as & attributes_read())


def read_by_name(key: str) -> bool:
    """Whether the composition root reads ``key`` of the configuration, as ``config["seed"]``, or who starts it does."""
    return key.rpartition(".")[2] in subscripts_read() or key in read_before_a_run()


@cache
def read_before_a_run() -> frozenset[str]:
    """Keys that Hydra's own settings follow, or that say which sweep a command line means."""
    settings = "".join(file.read_text(encoding="utf-8") for file in (CONF / "hydra").rglob("*.yaml"))
    tree = ast.parse((PACKAGE / "config" / "sweeps.py").read_text(encoding="utf-8"))
    named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return frozenset(re.findall(r"\$\{([\w.]+)\}", settings)) | frozenset(named)


@cache
def attributes_read() -> frozenset[str]:
    """Every ``x`` in ``something.x`` that the package reads."""
    found = (n for tree in sources() for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    return frozenset(n.attr for n in found if isinstance(n.ctx, ast.Load)) | subscripts_read()


@cache
def subscripts_read() -> frozenset[str]:
    """Every ``x`` in ``config["x"]`` that the composition root reads: run.py and what was taken out of it."""
    files = [*(PACKAGE / name for name in ("run.py", "session.py", "jobs.py")), *(PACKAGE / "assembly").iterdir()]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files if file.suffix == ".py"]
    found = (
        n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Load)
    )
    return frozenset(str(n.slice.value) for n in found if isinstance(n.slice, ast.Constant))


@cache
def sources() -> list[ast.Module]:
    return [ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")]


# ------------------------------------------------------------------------------------ the test, tested


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Dataclass:
    lr: float
    a_key_that_nobody_reads: int


class _Class:
    def __init__(self, *, lr: float, used: int, kept: int, forgotten: int, ignored: int):
        self.lr = lr  # read elsewhere in the package: optimizers have one
        self.double = used * 2
        self.kept_for_nobody = kept
        self.kept_twice = self.kept_for_nobody_either = forgotten


@pytest.mark.parametrize(
    ("target", "dead"),
    [(_Dataclass, {"a_key_that_nobody_reads"}), (_Class, {"kept", "forgotten", "ignored"})],
)
def test_a_planted_dead_key_is_found(target: type, dead: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "__module__", "ftlab.losses")
    monkeypatch.setattr(f"ftlab.losses.{target.__name__.strip('_')}", target, raising=False)
    names = inspect.signature(target).parameters
    node = {"_target_": f"ftlab.losses.{target.__name__.strip('_')}"} | dict.fromkeys(names, 1)
    assert {key.removeprefix("node.") for key in dead_keys({"node": node})} == dead


def test_a_planted_key_outside_of_any_target_is_found() -> None:
    assert list(dead_keys({"seed": 0, "a_scalar_that_nobody_reads": 1})) == ["a_scalar_that_nobody_reads"]


def test_a_key_that_is_no_parameter_is_found() -> None:
    node = {"_target_": "ftlab.losses.CrossEntropy", "label_smoothing": 0.0, "z_loss": 0.0, "focus": 1}
    assert list(dead_keys({"loss": node})) == ["loss.focus"]


def test_options_are_found_by_looking() -> None:
    assert {"model=llama_tiny", "optimizer=sgd", "experiment=alpaca_llama2_7b_full", "debug=smoke"} <= set(OPTIONS)
    assert Path(PACKAGE / "run.py").is_file()
