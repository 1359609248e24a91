"""What comes from outside runs no code: configurations in runs, folders of weights, tokenizers, templates, rows.

What S1 to S8 plant in checkpoints is in test_hostile.py. Each test leaves the canary file absent, and the answer
names the file or the key.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from ftlab.config.check import check_command_line, compose_config
from ftlab.data.files import file_rows, find_files
from ftlab.data.jinja_template import JinjaTemplate
from ftlab.data.problems import Problem
from ftlab.data.tokenizers.chat import render_chat
from ftlab.data.tokenizers.huggingface import HuggingFaceTokenizer
from ftlab.distributed.meeting import loopback_store
from ftlab.errors import ConfigError, ConfigErrors, DataError, FtlabError
from ftlab.lab.ask import ask
from ftlab.lab.export import export
from ftlab.lab.replay import replay
from ftlab.lab.runs import RunRecord
from ftlab.models.auto import AutoModelConfig, find_model
from ftlab.models.config import ModelConfig
from ftlab.models.hf import HFModel
from ftlab.models.layouts import open_folder
from ftlab.models.meta_layout import open_consolidated
from tests.cli.bad_input import QUIET, SMALL
from tests.cli.warm import ROOT, Warm, cold
from tests.faults.figures import Figure, trials
from tests.faults.test_hostile import Payload, seal

SECRET = "canary-of-the-environment"


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    """Where commands are forked from."""
    with Warm() as process:
        yield process


@pytest.fixture(scope="module")
def finished(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that went well, with an export."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    said = warm("train.py", *SMALL, *QUIET, f"paths.output_dir={folder}", cwd=folder.parent)
    assert said.exit_code == 0, said.stderr
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy, to plant something in."""
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that is made when planted code runs, and must not be there in the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "planted code was run"


@contextmanager
def in_time(seconds: int = 20) -> Iterator[None]:
    """Fail when what is inside hangs."""

    def late(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------ S9: _target_ in a stored configuration


def payloads(canary: Path) -> dict[str, dict[str, Any]]:
    """Targets that touch the canary, with their arguments."""
    pickled = canary.with_suffix(".pickle")
    pickled.write_bytes(pickle.dumps(Payload(canary)))
    saved = canary.with_suffix(".pt")
    torch.save(Payload(canary), saved)
    python = f"__import__('os').system('touch {canary}')"
    return {
        "torch.load": {"f": str(saved), "weights_only": False},
        "os.system": {"command": f"touch {canary}"},
        "subprocess.run": {"args": ["touch", str(canary)]},
        "pandas.read_pickle": {"filepath_or_buffer": str(pickled)},
        "builtins.open": {"file": str(canary), "mode": "w"},
        "sympy.sympify": {"a": python},
        "torch.utils.collect_env.run": {"command": f"touch {canary}"},
        "timeit.timeit": {"stmt": python, "number": 1},
        "ftlab.outputs.folder.RunFolder": {"path": str(canary)},
        "ftlab.storage.disk.DurableFile": {"path": str(canary)},
    }


def plant(config: dict[str, Any], place: str, node: dict[str, Any]) -> None:
    match place:
        case "a group":
            config["loss"] = node
        case "inside":
            config["dataset"]["format"] = node
        case "a list":
            config["logger"]["jsonl"]["more"] = [[node]]
        case "defaults":
            config["model"]["defaults"] = [{"override /loss": node}]
        case "an interpolation":
            config["run_name"] = node["_target_"]
            config["loss"] = node | {"_target_": "${run_name}"}
        case "_partial_":
            config["optimizer"] = node | {"_partial_": True}


PLACES = ("a group", "inside", "a list", "defaults", "an interpolation", "_partial_")


def change_stored(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the configuration in config.yaml, in the checkpoint, and the manifest with it."""
    [checkpoint] = (run / "checkpoints").iterdir()
    state = json.loads((checkpoint / "state.json").read_bytes())
    change(state["config"])
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint, [name for name in os.listdir(checkpoint) if name != "MANIFEST.json"])
    (run / "config.yaml").write_text(yaml.safe_dump(state["config"]))


READERS: dict[str, Callable[[Path], object]] = {
    "resume": lambda run: check_command_line([f"resume={run}"]),
    "resume with changes": lambda run: check_command_line([f"resume={run}", "trainer.max_steps=4"]),
    "generate": lambda run: ask(
        str(run), "hello", input="", on_text=print, max_new_tokens=1, temperature=0.0, top_p=1.0, seed=0
    ),
    "replay": lambda run: replay(run, 1),
    "export": lambda run: export(str(run), run / "out", None, "hf"),
}


def test_s9_the_payloads_work(canary: Path) -> None:
    for target, arguments in payloads(canary).items():
        module, _, name = target.rpartition(".")
        made = getattr(importlib.import_module(module), name)(**arguments)
        del made
        assert canary.exists(), f"{target} does nothing"
        canary.rmdir() if canary.is_dir() else canary.unlink()


@trials(few=40, all_=300)
def test_s9_a_target_in_a_stored_configuration_is_not_called(n: int, run: Path, canary: Path) -> None:
    cases = [(target, place, reader) for target in payloads(canary) for place in PLACES for reader in READERS]
    claim = f"{len(payloads(canary))} targets × {len(PLACES)} places × {len(READERS)} readers of a stored configuration"
    before = {name: (run / name).read_bytes() for name in ("config.yaml",)}
    [checkpoint] = (run / "checkpoints").iterdir()
    before |= {str(path.relative_to(run)): path.read_bytes() for path in checkpoint.iterdir()}
    with Figure("S9", f"{claim}: refused, the key named") as figure:
        for target, place, reader in figure.random("cases").sample(cases, min(n, len(cases))):
            node = {"_target_": target} | payloads(canary)[target]
            with figure.trial(f"{target} in {place}, {reader}"):
                change_stored(run, lambda config, place=place, node=node: plant(config, place, node))
                with pytest.raises(ConfigErrors, match=r"_target_: .* is not in the allowlist"):
                    READERS[reader](run)
                assert not canary.exists()
            for name, content in before.items():
                (run / name).write_bytes(content)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("group", ["model", "optimizer", "evaluation"])
def test_s9_a_configuration_without_a_part_is_named(reader: str, group: str, run: Path) -> None:
    change_stored(run, lambda config: config.pop(group))
    with pytest.raises(ConfigErrors, match=rf"{group}\._target_: is missing"):
        READERS[reader](run)


@pytest.mark.parametrize("reader", READERS)
def test_s9_a_configuration_without_a_bottom_is_refused(reader: str, run: Path) -> None:
    deep = json.loads("[" * 100 + "]" * 100)
    change_stored(run, lambda config: config.update(more=deep))
    with pytest.raises(ConfigErrors, match="is nested too deeply"):
        READERS[reader](run)
    assert RunRecord(run).config == {}


def test_s9_from_outside(run: Path, canary: Path, warm: Warm) -> None:
    change_stored(run, lambda config: plant(config, "a group", {"_target_": "os.system", "command": f"touch {canary}"}))
    commands = [
        ["train.py", f"resume={run}"],
        ["ftlab", "generate", str(run), "hello"],
        ["ftlab", "export", str(run), str(run / "out")],
    ]
    for command in commands:
        said = warm(*command, cwd=run.parent)
        assert (said.exit_code, "Traceback" in said.stderr) == (2, False)
        assert "loss._target_: 'os.system' is not in the allowlist" in said.stderr


# ------------------------------------------------------------------------------------------------- S10: resolvers


@pytest.mark.parametrize("text", ["${oc.env:PLANTED}", "${oc.decode:${oc.env:PLANTED}}", "${${seq_len}:PLANTED}"])
def test_s10_nothing_in_a_stored_configuration_is_resolved(
    text: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED", SECRET)
    change_stored(run, lambda config: config.update(run_name=text))
    overrides = [f"run_name='{text}-${{trainer.max_steps}}'", f"logger.wandb.project='{text}${{trainer.max_steps}}'"]
    (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    for more in ([], ["trainer.max_steps=4"]):
        config = check_command_line([f"resume={run}", *more])
        assert config is not None
        assert SECRET not in json.dumps(config)
        assert config["run_name"] == text


@pytest.mark.parametrize(
    "text",
    [
        "'x${oc.${run_name}:PLANTED}'",
        "'x${${run_name}:PLANTED}'",
        "'x${oc.env:PLANTED}'",
        r"x$\{oc.env\:PLANTED\}",  # Hydra takes the backslashes away
        r"x$\{oc.$\{run_name\}\:PLANTED\}",
    ],
)
def test_s10_a_stored_command_line_does_not_read_the_environment(
    text: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED", SECRET)
    name = "oc.env" if "${${" in text else "env"
    overrides = [f"run_name={name}", "logger=[wandb]", f"logger.wandb.project={text}"]
    (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    # A node without the key, which today's command line would fill in.
    node = {"_target_": "ftlab.loggers.wandb.WandbLogger", "entity": None, "group": None, "job_type": None, "tags": []}
    change_stored(run, lambda config: config.update(logger={"wandb": node}))
    config = check_command_line([f"resume={run}"])
    assert config is not None
    assert "project" in config["logger"]["wandb"]
    assert SECRET not in json.dumps(config)


def test_s10_a_stored_command_line_names_no_folder_of_options(run: Path, tmp_path: Path) -> None:
    (tmp_path / "evil" / "loss").mkdir(parents=True)
    (tmp_path / "evil" / "loss" / "mine.yaml").write_text("_target_: os.system\ncommand: 'true'\n")
    planted = [f"hydra.searchpath=[file://{tmp_path / 'evil'}]", "loss=mine"]
    (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(planted))
    with pytest.raises(ConfigErrors, match="loss: has no option 'mine'"):
        check_command_line([f"resume={run}", "trainer.max_steps=4"])


# ------------------------------------------------------------------------------------- S12, S13: code beside weights


def weights_with_code(folder: Path, canary: Path) -> Path:
    """A folder of weights that asks for its own model and tokenizer to be imported."""
    code = f"import os\nos.system('touch {canary}')\nclass Mine: pass\n"
    for name in ("modeling_mine", "configuration_mine", "tokenization_mine"):
        (folder / f"{name}.py").write_text(code)
    asks = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    config = {"model_type": "mine", "architectures": ["Mine"], "auto_map": asks}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens |= {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}, "tokenizer_class": "Mine"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


def test_s12_code_beside_weights_is_never_imported(run: Path, canary: Path) -> None:
    folder = weights_with_code(run / "export", canary)
    for model in (HFModel(checkpoint=str(folder)), AutoModelConfig(checkpoint=str(folder))):
        with pytest.raises(ConfigError, match=re.escape(str(folder))):
            find_model(model)
    HuggingFaceTokenizer(path=str(folder), added_tokens=[], added_special_tokens=[])


def sources() -> Iterator[tuple[Path, ast.AST]]:
    for file in [ROOT / "train.py", *(ROOT / "ftlab").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            yield file, node


def test_s12_nobody_ever_asks_for_remote_code() -> None:
    for file, node in sources():
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, file  # noqa: PT018
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                    assert isinstance(value, ast.Constant) and value.value is False, file  # noqa: PT018


def test_s3_s13_nothing_unpickles_or_unpacks() -> None:
    modules = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "tarfile", "zipfile"}
    for file, node in sources():
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {name.split(".")[0] for name in names} & modules, file
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "yaml.load_all", "shutil.unpack_archive"), file
            if called == "torch.load":
                assert "weights_only=True" in ast.unparse(node), file
            if called == "yaml.load":
                assert re.search(r"Loader=_Loader", ast.unparse(node)), file  # a safe one: looked at here


def test_s13_an_archive_of_rows_is_no_rows(tmp_path: Path) -> None:
    outside = tmp_path / "canary"
    for name in ("../canary", str(outside)):
        file = tmp_path / "folder" / "rows.json.gz"
        file.parent.mkdir(exist_ok=True)
        with tarfile.open(file, "w:gz") as archive:
            entry = tarfile.TarInfo(name)
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"[{}]"))
        found: list[Problem] = []
        with file.open("rb") as raw:
            assert list(file_rows("json", file, raw, None, found.append, 0)) == []
        assert str(file) in found[0].message
        assert not outside.exists()


def test_s13_names_inside_of_an_archive_of_weights_lead_nowhere(tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "weights" / "consolidated.00.pth"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("../canary", b""), ("x/data.pkl", pickle.dumps(Payload(canary))), ("x/version", b"3\n")):
            archive.writestr(name, content)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        open_consolidated(path.parent, llama(path.parent))


# --------------------------------------------------------------------------- S6, S7: files of weights, tokenizers, rows


def llama(checkpoint: Path) -> ModelConfig:
    node = compose_config(["model.dim=16", "model.n_heads=2", "model.n_layers=1", "model.ffn_hidden_dim=32"])["model"]
    node.pop("_target_")
    return ModelConfig(**node | {"checkpoint": str(checkpoint)})


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", 5, None, ["a"], "a\0.safetensors"],
)
def test_s6_an_index_names_files_of_its_folder_only(name: object, run: Path) -> None:
    folder = run / "export"
    (folder / "model.safetensors").rename(run / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json"):
        open_folder(folder, llama(folder))


def fifo(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**42)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def open_weights(folder: Path) -> object:
    return find_model(AutoModelConfig(checkpoint=str(folder))), open_folder(folder, llama(folder))


def open_tokenizer(folder: Path) -> object:
    return HuggingFaceTokenizer(path=str(folder), added_tokens=[], added_special_tokens=[])


def open_rows(folder: Path) -> object:
    [file] = find_files(str(folder / "rows.jsonl"), "json")
    with file.open("rb") as raw:
        return list(file_rows("json", file, raw, None, lambda problem: None, 0))


OPENED: dict[str, Callable[[Path], object]] = {
    "config.json": open_weights,
    "model.safetensors": open_weights,
    "consolidated.00.pth": lambda folder: open_consolidated(folder, llama(folder)),
    "tokenizer.json": open_tokenizer,
    "tokenizer_config.json": open_tokenizer,
    "rows.jsonl": open_rows,
    "template.jinja": lambda folder: JinjaTemplate(path=str(folder / "template.jinja")),
}


@pytest.mark.parametrize("name", OPENED)
@pytest.mark.parametrize("make", [fifo, sparse, device])
def test_s7_no_file_of_a_folder_hangs_its_reader(name: str, make: Callable[[Path], None], run: Path) -> None:
    folder = run / "export"
    for other in {name, "tokenizer.model"}:  # the one would do for the other
        (folder / other).unlink(missing_ok=True)
    make(folder / name)
    optional = name == "tokenizer_config.json" and make is not sparse  # as if there were none
    with in_time():
        if optional:
            OPENED[name](folder)
        else:
            with pytest.raises(FtlabError, match=f"{re.escape(str(folder))}|{re.escape(name)}"):
                OPENED[name](folder)


# ---------------------------------------------------------------------------------------------------- S15: YAML, JSON

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "content",
    [BOMB, "run_name: !!python/object/apply:os.system ['touch CANARY']\n", "[" * 50_000, "a: [1", "- 1\n- 2", "\0"],
    ids=["bomb", "tag", "deep", "torn", "list", "binary"],
)
@pytest.mark.parametrize("reader", ["generate", "replay", "resume with changes"])
def test_s15_yaml_of_a_stranger_is_only_data(content: str, reader: str, run: Path, canary: Path) -> None:
    resumes = reader == "resume with changes"
    (run / (".hydra/overrides.yaml" if resumes else "config.yaml")).write_text(content.replace("CANARY", str(canary)))
    with in_time():
        if resumes:  # it goes on without knowing what was typed then
            READERS[reader](run)
        else:
            with pytest.raises(FtlabError, match=re.escape(str(run))):
                READERS[reader](run)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_s15_deep_json_is_named(name: str, run: Path, warm: Warm) -> None:
    (run / "export" / name).write_text('{"a":' * 100_000)
    weights = (f"model.checkpoint={run / 'export'}", "tokenizer=huggingface")
    said = warm("train.py", *SMALL, *QUIET, *weights, cwd=run.parent)
    assert said.exit_code == 2
    assert name in said.stderr
    assert "Traceback" not in said.stderr


# ---------------------------------------------------------------------------------------------------- S16: sockets


def test_s16_the_store_listens_on_loopback_only() -> None:
    store = loopback_store()
    listening = [c.laddr for c in psutil.Process().net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == store.port] == ["127.0.0.1"]


@pytest.mark.soak
def test_s16_a_job_on_one_machine_listens_on_loopback_only(tmp_path: Path) -> None:
    claim = (
        "sockets of a job of 2 ranks (its own, and as started by hand on one machine) that are not on loopback: none"
    )
    by_hand = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": os.uname().nodename, "MASTER_PORT": "29622"}
    starts: dict[str, list[dict[str, str]]] = {
        "self-launched": [{}],
        "by hand": [by_hand | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)],
    }
    with Figure("S16", claim) as figure:
        for number in range(3):
            for how, environments in starts.items():
                with figure.trial(how):
                    more = ["parallelism=ddp", *(["parallelism.nproc_per_node=2"] if how == "self-launched" else [])]
                    (folder := tmp_path / f"{how}-{number}").mkdir()
                    command = ("train.py", *SMALL, *QUIET, *more, "trainer.max_steps=20", "dataset.max_samples=160")
                    jobs = [cold(*command, cwd=folder, env=env) for env in environments]
                    seen = {address for job in jobs for address in _listening(job.pid, lambda job=job: job.poll())}
                    assert [job.wait() for job in jobs] == [0] * len(jobs)
                    assert seen == {"127.0.0.1"}


def _listening(pid: int, ended: Callable[[], object]) -> Iterator[str]:
    """Addresses at which a process or one below it listens, as long as it lives."""
    while ended() is None:
        with_children = (
            [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)] if psutil.pid_exists(pid) else []
        )
        for process in with_children:
            try:
                for connection in process.net_connections(kind="inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        yield connection.laddr.ip
            except psutil.Error:
                continue


# ---------------------------------------------------------------------------------------------------- S17: templates

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].__init__.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ self.__init__ }}",
    "{{ (messages|attr('__class__')) }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ messages.append({'role': 'user'}) }}",
    "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "{{ 'x' * 100000000000 }}",
    "{{ 10 ** 100000000 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(1000000000) %}x{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_s17_a_template_cannot_leave_its_sandbox(template: str, canary: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with in_time(), pytest.raises((ConfigError, DataError), match="template"):
        print(
            render_chat(
                template.replace("CANARY", str(canary)),
                messages,
                add_generation_prompt=False,
                specials={"bos_token": "<s>"},
            )
        )


def test_s17_what_templates_need_still_works() -> None:
    template = "{% for m in messages %}{{ '-' * 3 }}{{ m.content.upper() }}{{ 2 ** 3 }}{{ 3 * 1.5 }}{% endfor %}"
    text = render_chat(template, [{"role": "user", "content": "a"}], add_generation_prompt=False, specials={})
    assert text == "---A84.5"
