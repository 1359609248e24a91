"""Every optimizer of conf/: what it keeps survives a checkpoint, on as many ranks and on others, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlab.config.build import build
from ftlab.config.check import compose_config
from ftlab.config.compose import CONF
from ftlab.distributed.env import WorkerEnv
from ftlab.models.row_files import open_rows, take_rows, write_rows
from ftlab.models.shards import all_rows
from ftlab.storage.disk import DurableFile
from ftlab.training import snapshot
from ftlab.training.loop import fit, remaining_steps, train_step
from tests.distributed.harness import run_ranks
from tests.distributed.strategies import in_group, strategy
from tests.loop.conftest import Rows, build_hand_run, precision_of

ROWS = Rows(24)
OPTIMIZERS = sorted(file.stem for file in (CONF / "optimizer").glob("*.yaml"))
SHARDED = [name for name in OPTIMIZERS if name != "adafactor"]  # refused under fsdp, see contradictions


def make(option: str, lr: float = 0.01) -> Any:
    """The optimizer of an option, as the composition root makes it."""
    if option == "schedule_free":
        pytest.importorskip("schedulefree")
    extra = ["scheduler=constant"] if option == "schedule_free" else []
    return build(compose_config([f"optimizer={option}", f"optimizer.lr={lr}", *extra])["optimizer"])


def of(option: str, worker: WorkerEnv | None, **options: Any) -> Any:
    """A run with that optimizer; sharded where there is a worker."""
    precision = "bf16" if option.endswith("bf16") else "fp32"
    parallel = strategy("fsdp").start(worker, precision_of(precision)) if worker else None
    batch_size = 8 // parallel.dp_size if parallel else 8
    given = {"make_optimizer": make(option), "precision": precision, "batch_size": batch_size, "max_steps": 6}
    return build_hand_run(ROWS, parallel=parallel, **given | options).run


def advance(run: Any, n: int) -> None:
    for micro_batches, _ in zip(remaining_steps(run), range(n), strict=False):
        train_step(run, micro_batches)
        run.state.progress.step += 1
        run.state.progress.epoch_step += 1


def save(run: Any, folder: Path) -> None:
    rank = run.parallel.rank
    with DurableFile(folder / f"rows-{rank}.safetensors") as file:
        write_rows(file, take_rows(snapshot.tensors(run.state)))
    if rank == 0:
        (folder / "state.json").write_text(json.dumps(snapshot.facts(run.state)))
    run.parallel.barrier()


def load(run: Any, folder: Path) -> None:
    told = json.loads((folder / "state.json").read_text())
    snapshot.restore(run.state, open_rows(sorted(folder.glob("*.safetensors"))), told, folder)


def whole(run: Any) -> dict[str, torch.Tensor]:
    """Every tensor of the state, whole on rank 0."""
    gathered = {name: list(all_rows(tensor)) for name, tensor in snapshot.tensors(run.state).items() if tensor.ndim}
    return {name: torch.cat(pieces) for name, pieces in gathered.items() if pieces}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


@pytest.mark.parametrize("option", OPTIMIZERS)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(option: str, tmp_path: Path) -> None:
    straight, stopped, resumed = (of(option, None) for _ in range(3))
    advance(straight, 6)
    advance(stopped, 3)
    save(stopped, tmp_path)
    load(resumed, tmp_path)
    advance(resumed, 3)
    assert same(whole(straight), whole(resumed)) == []
    assert snapshot.facts(straight.state)["optimizer"] == snapshot.facts(resumed.state)["optimizer"]


def in_shards(worker: WorkerEnv, folder: Path) -> dict[str, list[str]]:
    """Two ranks go on from one rank's checkpoint, and write one that a single rank reads; what differs, by option."""
    differing: dict[str, list[str]] = {}
    for option in SHARDED:
        run = of(option, in_group(worker, option))
        load(run, folder / option)
        (folder / option / "there").mkdir(exist_ok=True)
        save(run, folder / option / "there")
        advance(run, 2)
        torch.save(whole(run), folder / option / f"after-{worker.rank}.pt")
        run.parallel.close()
        differing[option] = []
    return differing


def test_the_state_goes_from_one_rank_to_two_and_back_without_a_bit_changed(tmp_path: Path) -> None:
    before = {}
    for option in SHARDED:
        (tmp_path / option).mkdir()
        run = of(option, None)
        advance(run, 3)
        save(run, tmp_path / option)
        before[option] = whole(run)
    run_ranks(2, in_shards, tmp_path)
    for option in SHARDED:
        back = of(option, None)
        load(back, tmp_path / option / "there")
        assert same(before[option], whole(back)) == [], option
        advance(back, 2)  # as the two ranks did: the same up to the order that gradients are summed in
        theirs = torch.load(tmp_path / option / "after-0.pt")
        for name, tensor in whole(back).items():
            if name.startswith("model."):
                # Muon's iterations and 16 bits round at 2**-8, and codes at their levels.
                tolerance = 2e-5 if option in ("adamw", "sgd", "schedule_free") else 0.02
                deviation = (theirs[name].float() - tensor.float()).abs().max()
                assert deviation <= tolerance, f"{option}: {name} {deviation}"


def test_what_schedule_free_answers_with_is_the_average_and_training_is_not_touched_by_it(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    run = of("schedule_free", None)
    advance(run, 4)
    before = whole(run)
    optimizer = run.state.optimizer
    with optimizer.averaged():
        average = {name: p.detach().clone() for name, p in run.state.model.named_parameters()}
    assert same(before, whole(run)) == []
    library = optimizer._library  # the library's own way from y to x
    library.state, library.param_groups = optimizer.state, optimizer.param_groups
    library.eval()
    for name, parameter in run.state.model.named_parameters():
        torch.testing.assert_close(average[name], parameter, rtol=1e-6, atol=1e-7)
    library.train()
    save(run, tmp_path)
    other = of("schedule_free", None)
    told = json.loads((tmp_path / "state.json").read_text())
    snapshot.restore_weights(other.state.model, open_rows([tmp_path / "rows-0.safetensors"]), told, tmp_path)
    for name, parameter in other.state.model.named_parameters():
        torch.testing.assert_close(average[name], parameter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("option", [name for name in OPTIMIZERS if name not in ("muon", "schedule_free")])
def test_in_the_backward_every_optimizer_that_may_gives_the_same_bits(option: str) -> None:
    ends = [of(option, None, max_grad_norm=None, optimizer_in_backward=choice) for choice in (False, True)]
    for run in ends:
        fit(run)
    assert same(*map(whole, ends)) == []


def test_muon_is_torchs_on_hidden_matrices_and_adamw_elsewhere() -> None:
    lr = 1e-4  # with more, a different rounding of the first step would be another run by the third
    ours = of("muon", None, max_steps=3, make_optimizer=make("muon", lr))
    theirs = of("adamw", None, max_steps=3)
    model = theirs.state.model
    hidden = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is one for one in hidden)]
    muon = torch.optim.Muon(hidden, lr=lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [p for p in rest if p.ndim > 1]},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    advance(ours, 3)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for micro_batches, _ in zip(remaining_steps(theirs), range(3), strict=False):
        n_targets = sum(batch.n_targets for batch in micro_batches)
        for batch in micro_batches:
            (model(batch.tokens, batch.targets, theirs.loss) / n_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adamw.step()
        model.zero_grad()
    for (name, mine), other in zip(ours.state.model.named_parameters(), model.parameters(), strict=True):
        # Both divide by the size of gradients that may be next to nothing, so single elements tell little.
        assert (mine - other).norm() < 0.01 * (other - start[name]).norm(), name
