"""Weights go straight into shards and come straight out of them: the same bits, and never a whole model in one rank."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ftlab.assembly.model import build_model, random_weights, weights_in
from ftlab.distributed.base import Strategy
from ftlab.distributed.env import WorkerEnv, keep_freed_memory
from ftlab.models.meta_layout import meta_names
from ftlab.models.safetensors_stream import SafetensorsWriter
from ftlab.models.shards import held_rows
from ftlab.models.transformer import ModelConfig
from ftlab.models.weights import export_weights, load_weights
from tests.distributed.harness import run_ranks
from tests.distributed.strategies import in_group, precision_of, strategy, whole_weights
from tests.loop.conftest import MODEL

MIB = 2**20
# 101 rows of embedding, 2 key heads of 8: shares of 4 ranks are unequal, and some are of few rows.
SHARDED = {
    "ddp": strategy("ddp"),
    "fsdp": strategy("fsdp"),
    "hsdp": strategy("hsdp", replicate_degree=2),
    "cpu_offload": strategy("fsdp", cpu_offload=True),
}
BIG = MODEL.replace(
    dim=1024, n_layers=8, n_heads=16, n_kv_heads=16, head_dim=None, ffn_hidden_dim=2816, vocab_size=8000
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ``MODEL``'s weights, drawn with seed 3."""
    return write_folder(MODEL, tmp_path_factory.mktemp("weights"), seed=3)


def write_folder(config: ModelConfig, folder: Path, seed: int) -> Path:
    model = config.build()
    model.init_weights(seed)
    export_weights(model, folder, dtype=torch.float32, bos_id=1, eos_id=2, pad_id=None)
    return folder


def drawn_loaded_exported(
    worker: WorkerEnv, folder: Path, to: Path
) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Under every strategy: weights drawn with seed 0, weights loaded from ``folder``; these exported again."""
    results = {}
    for name, parallelism in SHARDED.items():
        parallel = parallelism.start(in_group(worker, name), precision_of("fp32"))
        model = build_model(MODEL, random_weights(0), precision_of("fp32"), parallel)
        drawn = whole_weights(model)
        load_weights(model, folder)
        results[name] = drawn, whole_weights(model)
        # 40 kB: more than one file.
        export_weights(model, to / name, dtype=torch.float32, bos_id=1, eos_id=2, pad_id=None, max_shard_bytes=40_000)
        parallel.close()
    return results


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_drawn_loaded_and_exported_weights_are_those_of_one_process_bitwise(
    n_ranks: int, exported: Path, tmp_path: Path
) -> None:
    drawn, loaded = MODEL.build(), MODEL.build()
    drawn.init_weights(0)
    load_weights(loaded, exported)
    result, *_ = run_ranks(n_ranks, drawn_loaded_exported, exported, tmp_path)
    for name, pair in result.items():
        for ours, theirs in zip((drawn, loaded), pair, strict=True):
            for key, parameter in ours.named_parameters():
                assert torch.equal(theirs[key], parameter), f"{name}: {key}"
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        original = AutoModelForCausalLM.from_pretrained(exported).state_dict()
        assert all(torch.equal(again[key], original[key]) for key in original), name


def test_a_stream_in_pieces_is_the_file_that_the_library_writes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {"b": torch.randn(7, 3), "a": torch.randn(5), "empty": torch.randn(0, 4)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with (tmp_path / "file").open("wb") as file:
            writer = SafetensorsWriter(file, {k: (tuple(t.shape), dtype) for k, t in tensors.items()})
            for tensor in tensors.values():
                for piece in tensor.split(2):
                    writer.write(piece.to(dtype))
            writer.finish()
        read = load_file(tmp_path / "file")
        assert {k: t.dtype for k, t in read.items()} == dict.fromkeys(tensors, dtype)
        assert all(torch.equal(read[name], tensor.to(dtype)) for name, tensor in tensors.items())


# ---------------------------------------------------------------------------------------------- memory


def peak_of_resident_set() -> int:
    """Bytes: anonymous memory and mapped files, the highest since the last ``forget_peak``."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_of_resident_set()


def peaks(worker: WorkerEnv, parallelism: Strategy, folder: Path, to: Path) -> dict[str, Any]:
    """Bytes above the start that a rank needs to load ``BIG``, and to export it."""
    keep_freed_memory()  # as runs on a CPU do
    parallel = parallelism.start(worker, precision_of("fp32"))
    # Once in small: code that is used for the first time comes from libraries' files and counts as resident too.
    small = build_model(MODEL, random_weights(0), precision_of("fp32"), parallel)
    export_weights(small, to, dtype=torch.bfloat16, bos_id=1, eos_id=2, pad_id=None)
    load_weights(small, to)
    start = forget_peak()
    model = build_model(BIG, weights_in(folder), precision_of("fp32"), parallel)
    loading = peak_of_resident_set() - start
    forget_peak()
    export_weights(model, to, dtype=torch.bfloat16, bos_id=1, eos_id=2, pad_id=None)
    exporting = peak_of_resident_set() - start
    held = sum(held_rows(parameter)[0].nbytes for parameter in model.parameters())
    parallel.close()
    return {"loading": loading, "exporting": exporting, "held": held}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's to know")
@pytest.mark.parametrize("n_shards", [1, 2, 8])
def test_loading_consolidated_shards_needs_a_tenth_more_than_the_model(n_shards: int, tmp_path: Path) -> None:
    run_ranks(1, write_big, tmp_path / "weights", "consolidated", n_shards)
    [result] = run_ranks(1, peaks, strategy("single"), tmp_path / "weights", tmp_path / "export")
    whole = BIG.n_params() * 4
    assert result["held"] == whole
    assert result["loading"] <= 1.1 * whole, f"{result['loading'] / whole:.3f} × model"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's to know")
@pytest.mark.parametrize("layout", ["safetensors", "consolidated"])
def test_no_rank_needs_more_than_its_share_a_block_and_50_mib(layout: str, tmp_path: Path) -> None:
    run_ranks(1, write_big, tmp_path / "weights", layout)
    whole = BIG.n_params() * 4
    with torch.device("meta"):
        block = sum(parameter.nbytes for parameter in BIG.build().blocks[0].parameters())
    assert whole >= 400 * MIB
    for rank, result in enumerate(run_ranks(4, peaks, strategy("fsdp"), tmp_path / "weights", tmp_path / "export")):
        assert result["held"] == pytest.approx(whole / 4, rel=0.01)
        for phase in ("loading", "exporting"):
            used = result[phase]
            assert used <= whole / 4 + block + 50 * MIB, f"rank {rank}, {phase}: {used / MIB:.0f} MiB"


def write_big(worker: WorkerEnv, folder: Path, layout: str, n_shards: int = 1) -> None:
    if layout == "safetensors":
        write_folder(BIG, folder, seed=0)
        return
    model = BIG.build()
    model.init_weights(seed=0)
    names = meta_names(BIG)
    folder.mkdir()
    for i in range(n_shards):
        shard = {}
        for name, parameter in model.named_parameters():
            columns = name.startswith("embedding") or name.endswith(("o_proj.weight", "down_proj.weight"))
            whole = parameter.ndim == 1
            part = parameter.detach() if whole else parameter.detach().chunk(n_shards, int(columns))[i]
            shard[names[name]] = part.clone()
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
