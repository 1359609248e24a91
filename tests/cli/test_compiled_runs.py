"""``compile=true`` from the command line: faster kernels, the same training, and the same bits after a resume."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from ftlab.models.cpu_attention import attend_with


@pytest.fixture(autouse=True)
def torchs_kernel_again() -> Iterator[None]:
    """What a compiled run chose for this process is not for the tests after it."""
    yield
    attend_with(None)


PACKED = "dataset.packing=best_fit", "loss=chunked_cross_entropy", "evaluation.n_samples=0", "scheduler=constant"


def test_a_compiled_run_trains_as_a_plain_one_and_goes_on_with_the_same_bits(tiny_run):
    plain = tiny_run(*PACKED, "trainer.max_steps=4", name="plain")
    straight = tiny_run(*PACKED, "trainer.max_steps=4", "compile=true", name="straight")
    assert plain.exit_code == straight.exit_code == 0
    assert straight.json("run.json")["attention"] == "own kernel"
    assert plain.json("run.json")["attention"].startswith("flash")
    assert straight.losses == pytest.approx(plain.losses, rel=1e-5)

    resumed = tiny_run(*PACKED, "trainer.max_steps=2", "compile=true", name="resumed")
    assert resumed.exit_code == 0
    assert resumed.go_on("trainer.max_steps=4") == 0
    assert resumed.losses == straight.losses
    exports = [
        {file.name: file.read_bytes() for file in (run.folder / "export").glob("*.safetensors")}
        for run in (straight, resumed)
    ]
    assert exports[0] == exports[1] != {}


def test_compilation_without_a_compiler_is_a_mistake_of_the_user(tiny_run, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    run = tiny_run("compile=true", "trainer.max_steps=1")
    assert run.exit_code == 2
    told = capsys.readouterr().err
    assert "compile: true needs a compiler, but there is no no-such-compiler (from CXX)" in told
    assert "try: compile=false" in told
    assert json.loads((run.folder / "run.json").read_text())["status"] == "failed"
