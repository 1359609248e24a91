"""Every command in the pages is executed, or composed and checked as far as it can be without what it names.

`HOW` says how each kind of command is treated; a command of no kind fails, so that no page promises what is not there.
Big configurations are composed and checked to the last argument, not trained. ``RUN`` is a run that is really trained.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ftlab import cli
from ftlab.config.check import check_command_line, compose_config
from ftlab.config.resume import resume_in, resumed_config
from ftlab.errors import ConfigErrors
from ftlab.jobs import launch
from tests.cli.conftest import QUIET, SMALL
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> Iterator[str]:
    """The commands of a page's ``bash`` blocks, continued lines joined, comments and trailing dots gone."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.sub(r"\s#.*$|^#.*$", "", line).split(" && "):
                if text := re.sub(r"\s+(\[.*\]|\.\.\.)$", "", command.strip()):
                    yield text


FOUND = {command: page.stem for page in reversed(PAGES) for command in commands(page)}  # each once
COMMANDS = [pytest.param(command, id=f"{page}: {command}") for command, page in FOUND.items()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small finished runs, and files that pages name."""
    place = tmp_path_factory.mktemp("docs")
    for name, rate in (("OTHER", 2e-3), ("RUN", 1e-3)):
        config = compose_config(
            [*SMALL, *QUIET, "trainer.max_steps=50", "evaluation.n_samples=0", "checkpoint.keep_best=1",
             f"optimizer.lr={rate}", "checkpoint.every_steps=10", "checkpoint.keep_last=9"],
            output_dir=place / "outputs" / "2026-01-01" / name,
        )  # fmt: skip
        assert launch(config, own_process=False) == 0
    (place / "RUN").symlink_to("outputs/2026-01-01/RUN")
    (place / "OTHER").symlink_to("outputs/2026-01-01/OTHER")
    (place / "7B_full.yaml").write_text(TORCHTUNE)
    return place


TORCHTUNE = """
model: {_component_: torchtune.models.llama2.llama2_7b}
tokenizer: {_component_: torchtune.models.llama2.llama2_tokenizer, path: /weights/tokenizer.model}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: /weights}
dataset: {_component_: torchtune.datasets.alpaca_dataset}
optimizer: {_component_: torch.optim.AdamW, lr: 2e-5}
lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, num_warmup_steps: 1}
loss: {_component_: torch.nn.CrossEntropyLoss}
dtype: bf16
"""


def of_train_py(command: str, workplace: Path) -> None:
    """Composed and checked like the real start, all jobs of a sweep too; only what the page names may be absent."""
    words = shlex.split(command)
    argv = [word.replace("=/shared/", f"={workplace}/shared/") for word in words[words.index("train.py") + 1 :]]
    if resume_in(argv) is not None:
        replaced = [re.sub(r"^resume=outputs/\d.*", "resume=latest", word) for word in argv]
        resumed_config(replaced, {"primary": "train", "extra_dir": None})
        return
    if any(
        "DATE/TIME_NAME" in word for word in argv
    ):  # a sweep's folder: tests/cli/test_sweeps.py goes on with real ones
        return
    try:
        check_command_line(argv)
    except ConfigErrors as errors:
        told = [problem for problem in errors.problems if not absent(problem.problem)]
        assert told == [], command


def absent(problem: str) -> bool:
    made_up = "has no option 'mine'" in problem  # which docs/extending.md says how to make
    return "no such file or folder" in problem or "ftlab[" in problem or made_up


def of_ftlab(command: str, workplace: Path) -> None:
    """The verb and its flags exist; what is cheap is done."""
    words = shlex.split(command.partition(" > ")[0])
    argv = words[words.index("ftlab") + 1 :]
    verb = argv[0]
    parsed = cli.parse(argv)
    if verb in RUN_HERE:
        shutil.rmtree(workplace / "OUT", ignore_errors=True)
        assert cli.main(argv) in RUN_HERE[verb]
    elif overrides := getattr(parsed, "overrides", []):
        of_train_py(shlex.join(["python", "train.py", *overrides]), workplace)


# Exit codes that are right for these runs; every other verb trains, downloads or measures, and has tests of its own.
RUN_HERE = {
    "explain": (0,), "ls": (0,), "tree": (0,), "diff": (1,), "replay": (0,), "generate": (0,), "from-torchtune": (0,),
    "export": (0,),
}  # fmt: skip


def of_pip(command: str, workplace: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"\[(.*?)\]", command):
        assert set(named.split(",")) <= set(extras)


def of_pytest(command: str, workplace: Path) -> None:
    for word in shlex.split(command):
        assert not word.startswith("tests/") or (ROOT / word.partition("::")[0]).exists()


def of_benchmark(command: str, workplace: Path) -> None:
    script = next(word for word in shlex.split(command) if word.endswith(".py"))
    assert (ROOT / script).is_file()


def of_others(command: str, workplace: Path) -> None:
    """Of another program."""


HOW: list[tuple[str, Callable[[str, Path], None]]] = [
    (r"(\w+=\S+ )*(torchrun .*|srun .*python |python )train\.py\b", of_train_py),
    (r"(python -m )?ftlab ", of_ftlab),
    (r"pip install ", of_pip),
    (r"(\w+=\S+ )*pytest\b", of_pytest),
    (r"(\w+=\S+ )*python benchmarks/", of_benchmark),
    (r"(wandb (sync|sweep|agent|login)|tensorboard --logdir) ?", of_others),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_pages_works(command: str, workplace: Path, monkeypatch, capsys) -> None:
    treat = next((how for pattern, how in HOW if re.match(pattern, command)), None)
    assert treat is not None, f"say in HOW how {command!r} is tried"
    monkeypatch.chdir(workplace)
    treat(command, workplace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    named = re.findall(r"`(docs/[\w/]+\.md|conf/[\w/]+\.yaml|ftlab/[\w/]+\.py|tests/[\w/]+\.py)`", text)
    made_up = {"conf/local/default.yaml", *re.findall(r"`(conf/\w+/(?:my_\w+|mine|rmsprop)\.yaml)`", text)}
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [path for path in named if path not in made_up and not (ROOT / path).exists()] == []


def test_the_index_has_every_page() -> None:
    linked = re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8"))
    assert sorted(set(linked)) == sorted(page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md")


def test_the_options_that_a_page_shows_compose(tmp_path: Path, monkeypatch) -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    shown = re.findall(r"`conf/(model|dataset|optimizer)/(\w+)\.yaml`[^`]*```yaml\n(.*?)```", text, re.DOTALL)
    assert [group for group, _, _ in shown] == ["model", "dataset", "optimizer"]
    for group, name, content in shown:
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(content)
    monkeypatch.chdir(tmp_path)
    chosen = [f"{group}={name}" for group, name, _ in shown]
    with pytest.raises(ConfigErrors) as found:
        check_command_line(["--config-dir", str(tmp_path), *chosen])
    assert [problem for problem in found.value.problems if not absent(problem.problem)] == []
