"""The import law: a module imports only from below its own floor, and rooms on one floor do not know each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up. A room is a module or a package directly under ftlab/.
FLOORS = [
    {"errors", "ctrl_c", "typed", "shapes"},
    {"storage", "prefixes"},
    {"outputs", "plots"},
    {"exit_codes"},
    {"config", "data", "distributed", "losses", "loggers", "models", "optim"},
    {"training"},
    {"forecast", "session"},
    {"remedies"},
    {"assembly"},
    {"run"},
    {"jobs"},
    {"lab"},
    {"hydra_plugins", "verbs"},
    {"cli", "train.py"},
    {"__main__"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
KNOW_HYDRA = {"config", "run", "hydra_plugins", "train.py"}

FILES = {"train.py": ROOT / "train.py"} | {
    str(file.relative_to(ROOT)): file
    for package in ("ftlab", "hydra_plugins")
    for file in sorted((ROOT / package).rglob("*.py"))
    if file.name != "__init__.py"
}


def room_of(name: str) -> str:
    top, _, rest = name.partition("/")
    return rest.removesuffix(".py").split("/")[0] if top == "ftlab" else top


def imports(source: str) -> list[tuple[str, int]]:
    """Every absolute module or member that ``source`` imports, with its line; type-checking imports count too."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; say where from"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def broken(name: str, source: str) -> list[str]:
    """The imports of ``source``, the file ``name``, that the law forbids."""
    room = room_of(name)
    wrong = []
    for module, line in imports(source):
        package, _, rest = module.partition(".")
        if package in ("hydra", "omegaconf") and room not in KNOW_HYDRA:
            wrong.append(f"{name}:{line} imports {module}; only {', '.join(sorted(KNOW_HYDRA))} may know Hydra")
        other = rest.split(".")[0]
        if package != "ftlab" or other == room or not other:
            continue
        if FLOOR.get(other, -1) >= FLOOR[room]:  # what is no room is the package's own: the ground
            wrong.append(f"{name}:{line} imports {module}, which is not below {room}")
    return wrong


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_only_from_below(name: str) -> None:
    assert room_of(name) in FLOOR, f"{name} is on no floor yet: say in FLOORS where it belongs"
    assert broken(name, FILES[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("ftlab/models/x.py", "from ftlab.data.batch import Batch"),
        ("ftlab/data/x.py", "from ftlab.training import loop"),
        ("ftlab/errors.py", "import ftlab.outputs"),
        ("ftlab/training/x.py", "from ftlab.run import launch"),
        ("ftlab/run.py", "from ftlab import cli"),
        ("ftlab/training/x.py", "from omegaconf import DictConfig"),
        ("ftlab/data/x.py", "def f():\n    import hydra.utils"),
    ],
)
def test_a_planted_breach_is_found(name: str, line: str) -> None:
    assert len(broken(name, line)) == 1


def test_what_the_law_allows_passes() -> None:
    source = "import torch\nfrom ftlab.errors import ConfigError\nfrom ftlab.data.batch import Batch\n"
    assert broken("ftlab/data/loader.py", source) == []
