"""After a power loss at any instant, the newest checkpoint that was ever reported complete is there and sound."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ftlab.storage.addresses import find_run
from ftlab.storage.checkpoints import verify
from tests.faults.acts import Journal
from tests.faults.figures import Figure, trials
from tests.faults.harness import Folder
from tests.faults.power import Disk, trees_after_power_loss


def journal_of(folder: Folder) -> list[tuple[str, str, bytes]]:
    """All changes of a run, with the contents of files."""
    entries = []
    with folder.interrupt(Journal()) as trial:
        while (entry := trial.next_word()) is not None:
            entries.append(entry)
    return entries


@trials(few=1, all_=30)
def test_r12_power_loss_at_any_instant(n: int, tmp_path: Path) -> None:
    claim = "power loss after each change of a run with 4 saves and 2 removals: every legal tree holds a sound one"
    folder = Folder(tmp_path / "run")
    entries = journal_of(folder)
    assert [entry[1] for entry in entries if entry[0] == "rename" and "/" in entry[1]] == [
        f"checkpoints/{name}"
        for name in (
            *("step_00000003", "step_00000006", "step_00000009", "step_00000003.tmp"),
            *("step_00000012", "step_00000006.tmp"),
        )
    ]
    disk, safe, n_trees = Disk(), 0, 0
    began: set[int] = set()
    with Figure("R12", claim) as figure:
        rng = figure.random("subsets")
        for number, (operation, path, content) in enumerate(entries):
            disk.apply(operation, path, content)
            name = Path(path).name
            if operation == "rename" and path.startswith("checkpoints/step_") and not name.endswith(".tmp"):
                began.add(int(name.removeprefix("step_")))
            if operation == "fsync_folder" and name == "checkpoints":
                safe = max(began, default=0)  # only now has `commit` returned
            if n == 1 and operation == "write" and number % 12:
                continue
            with figure.trial(f"{number} {operation} {path}"):
                for tree in trees_after_power_loss(disk, rng, n):
                    n_trees += 1
                    check_what_is_found(tree, tmp_path / "after", folder, safe, began)
        figure.remarks.append(f"{n_trees} trees")
    assert safe == 12


def check_what_is_found(tree: dict[str, bytes | None], root: Path, folder: Folder, safe: int, began: set[int]) -> None:
    """A resume finds the newest one that was complete, or one that was just becoming so."""
    if root.exists():
        shutil.rmtree(root)
    root.mkdir()
    for path, content in tree.items():
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)
    if not safe and not tree.get("run.json"):
        return  # no run yet, or none that anybody has been told of
    assert json.loads((root / "run.json").read_text())["id"] == folder.record()["id"], "run.json"
    if not safe and not any((root / f"checkpoints/step_{step:08d}/MANIFEST.json").exists() for step in began):
        return
    address = find_run(str(root), "resume")
    found = address.checkpoints.newest_sound(folder.record()["id"])
    assert found is not None, f"{sorted(tree)}"
    assert found.step >= safe, f"step {found.step} found, {safe} was complete"
    assert found.step in began
    verify(found, folder.record()["id"])
    assert {"rng-00000.json", "state.json", "rows-00000-of-00001.safetensors"} < set(os.listdir(found.path))
