"""Compare ftlab with transformers' Trainer, TRL and torchtune: same rows, weights, optimizer, in turns on one machine.

    python benchmarks/compare.py --rows alpaca.json --tokenizer tokenizer.model [--only ftlab torchtune] [--rounds 3]

Needs the extra ``dev`` (transformers). What else a peer needs is installed into a folder of its own under
``--cache`` at its first use; torch is the one that ftlab runs with. Every contestant is a process that stays for
the whole comparison; they take turns of ``--steps`` optimizer steps, so that a slow moment of the machine meets all
of them. The first turn of each is its warm-up (compilation, first allocation) and is not counted.

Real tokens are counted: what goes through the model and is not padding. All batches hold about as many:
``--batch-size`` rows, or in packed layouts half as many rows of ``seq_len`` tokens. Before the first and after the
last step each contestant tells the loss of the same rows: before, all must agree.

Writes ``NAME.md``, ``NAME.json`` and ``NAME.png`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftlab.assembly.data import read_data
from ftlab.config.build import build
from ftlab.config.check import compose_config
from ftlab.data.samples import Samples
from ftlab.distributed.env import describe_device, peak_flops
from ftlab.models.cpu_products import multiplied_by_onednn

HERE = Path(__file__).parent
OURS = ("GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE")  # importing ftlab sets them, unless they are set; not for its peers
PEERS = {
    "trainer": ["accelerate==1.15.0"],
    "torchtune": ["torchtune==0.6.1", "torchao==0.13.0", "torchdata==0.11.0"],
    "trl": ["trl==1.16.0", "accelerate==1.15.0"],
}
SEQ_LEN, LR = 512, 1e-4
PACKED = ["dataset.packing=best_fit"]
SHARED = [*PACKED, "trainer.share_prefixes=true"]
BF16 = ["precision=bf16", "loss=chunked_cross_entropy"]
MIXED = ["precision=bf16_mixed", "loss=chunked_cross_entropy"]

# name: (module, packages, what is special)
CONTESTANTS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "Trainer fp32": ("trainer", "trainer", {}),
    "Trainer fp32 compile": ("trainer", "trainer", {"compile": True}),
    "Trainer bf16": ("trainer", "trainer", {"bf16": True}),
    "Trainer bf16 grouped": ("trainer", "trainer", {"bf16": True, "grouped": True}),
    "Trainer bf16 compile": ("trainer", "trainer", {"bf16": True, "compile": True}),
    "TRL bf16 packed": ("trainer", "trl", {"bf16": True, "packing": True}),
    "torchtune fp32": ("tune", "torchtune", {}),
    "torchtune bf16": ("tune", "torchtune", {"weights": "bf16"}),
    "torchtune fp32 packed": ("tune", "torchtune", {"packing": True}),
    "torchtune bf16 packed": ("tune", "torchtune", {"weights": "bf16", "packing": True}),
    "ftlab fp32 padded": ("ours", None, {"more": []}),
    "ftlab fp32 packed": ("ours", None, {"more": [*PACKED, "loss=chunked_cross_entropy"], "packing": True}),
    "ftlab fp32 packed compile": (
        "ours",
        None,
        {"more": [*PACKED, "loss=chunked_cross_entropy", "compile=true"], "packing": True},
    ),
    "ftlab fp32 packed shared": ("ours", None, {"more": [*SHARED, "loss=chunked_cross_entropy"], "packing": True}),
    "ftlab fp32 packed shared compile": (
        "ours",
        None,
        {"more": [*SHARED, "loss=chunked_cross_entropy", "compile=true"], "packing": True},
    ),
    "ftlab bf16_mixed packed": ("ours", None, {"more": [*PACKED, *MIXED], "packing": True}),
    "ftlab bf16 packed": ("ours", None, {"more": [*PACKED, *BF16], "packing": True}),
    "ftlab bf16_mixed packed compile": ("ours", None, {"more": [*PACKED, *MIXED, "compile=true"], "packing": True}),
    "ftlab bf16 packed compile": ("ours", None, {"more": [*PACKED, *BF16, "compile=true"], "packing": True}),
    "ftlab bf16 packed shared compile": ("ours", None, {"more": [*SHARED, *BF16, "compile=true"], "packing": True}),
}


class Contestant:
    """A process that trains in turns (``peers/pacer.py``)."""

    def __init__(self, name: str, shared: dict[str, Any], cache: Path):
        module, packages, special = CONTESTANTS[name]
        path = [str(HERE.parent)]
        if packages is not None:
            path.insert(0, str(environment(packages, cache)))
        size = shared["batch_size"] // 2 if special.get("packing") else shared["batch_size"]
        setting = shared | special | {"batch_size": size}
        if module == "ours":
            setting["overrides"] = [*shared["overrides"], f"trainer.batch_size={size}"]
        self.name, self.turns = name, list[dict[str, Any]]()
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False)  # noqa: SIM115 -- as long as the process
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "peers" / f"{module}.py"), json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={k: v for k, v in os.environ.items() if k not in OURS}
            | {"PYTHONPATH": os.pathsep.join(path), "TOKENIZERS_PARALLELISM": "false"},
        )
        self.loss_before = self._answer()["loss"]
        self.loss_after = float("nan")

    def turn(self, n_steps: int, *, counts: bool) -> None:
        """Let it do so many optimizer steps."""
        self._tell({"steps": n_steps})
        answer = self._answer()
        if counts:
            self.turns.append(answer)

    def end(self) -> None:
        self._tell({"end": True})
        self.loss_after = self._answer()["loss"]
        self._process.wait(60)

    @property
    def rates(self) -> list[float]:
        """Real tokens per second of every turn that counts."""
        return [turn["tokens"] / turn["seconds"] for turn in self.turns]

    def _tell(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            told = f"{self.name} ended early with {self._process.wait()} (-9: killed, perhaps for want of memory)"
            raise RuntimeError(f"{told}; see {self._log.name}:\n{Path(self._log.name).read_text()[-2000:]}")
        found: dict[str, Any] = json.loads(line)
        return found


def chosen(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Names of those that compete, and of those left out though they were asked for."""
    names = [n for n in CONTESTANTS if not arguments.only or any(part in n for part in arguments.only)]
    # torch alone then computes a gradient's products a hundred times slower than float32's: minutes for one step.
    hopeless = not arguments.slow and not multiplied_by_onednn(torch.bfloat16)
    left_out = [n for n in names if hopeless and "bf16" in n and not n.startswith("ftlab")]
    return [n for n in names if n not in left_out], left_out


def environment(name: str, cache: Path) -> Path:
    """The folder with a peer's packages, installed at the first use; their dependencies are those of ``dev``."""
    folder = cache / "-".join(PEERS[name]).replace("==", "_")
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, *PEERS[name]], check=True)
    return folder


def prepare(rows: Path, tokenizer: Path, folder: Path, batch_size: int) -> dict[str, Any]:
    """Weights and rows as files that every contestant reads."""
    import transformers

    overrides = [
        "model=auto",
        f"model.checkpoint={folder / 'model'}",
        "tokenizer=sentencepiece",
        f"tokenizer.path={tokenizer}",
        "dataset=alpaca",
        "dataset.source=json",
        f"dataset.data_files={rows}",
        "dataset.val_fraction=0",
        f"seq_len={SEQ_LEN}",
        f"optimizer.lr={LR}",
        "optimizer.betas=[0.9,0.999]",
        "optimizer.weight_decay=0.0",
        "scheduler=constant",
        "scheduler.warmup_ratio=null",
        "scheduler.warmup_steps=0",
        "trainer.max_steps=10000",
        "device=cpu",
    ]
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=688,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(shape).save_pretrained(folder / "model")
    config = compose_config(overrides)
    data = read_data(config, build(config["tokenizer"]))
    assert isinstance(data.train, Samples)  # neither packed nor streamed
    order = np.random.default_rng(0).permutation(len(data.train))
    tokens = [data.train.sample(int(i)).tokens for i in order]
    np.savez(folder / "rows.npz", tokens=np.concatenate(tokens), lengths=[len(t) for t in tokens])
    return {
        "rows": str(folder / "rows.npz"),
        "model": str(folder / "model"),
        "overrides": overrides,
        "batch_size": batch_size,
        "seq_len": SEQ_LEN,
        "lr": LR,
    }


def write(name: str, contestants: list[Contestant], left_out: list[str], arguments: argparse.Namespace) -> None:
    """Table, numbers and picture."""
    import matplotlib
    import transformers

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cpu = torch.device("cpu")
    peaks = {dtype: peak_flops(cpu, dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16)}
    told = (
        f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, {describe_device(cpu)}, matmul "
        f"{peaks[torch.float32]:.0f} GFLOP/s float32 and {peaks[torch.bfloat16]:.0f} bfloat16 at the end; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        + ", ".join(sorted({package.replace("==", " ") for packages in PEERS.values() for package in packages}))
    )
    lines = [
        f"# Real tokens/s, Llama of 20 M parameters (dim 256, 4 blocks, vocabulary 32,000), {arguments.rows.name}",
        "",
        told + ".",
        "",
        f"`python benchmarks/compare.py {' '.join(Path(word).name for word in sys.argv[1:])}`",
        "",
        f"{arguments.rounds} turns of {arguments.steps} steps each, taken in rotation.",
        "",
        "| | median | min | max | loss before | after as many steps |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.name} | {statistics.median(one.rates):,.0f} | {min(one.rates):,.0f} | {max(one.rates):,.0f} "
        f"| {one.loss_before:.4f} | {one.loss_after:.4f} |"
        for one in contestants
    ]
    if left_out:
        why = "this CPU has no instructions for bfloat16, and torch's own loops take minutes a step"
        lines += ["", f"Left out: {', '.join(left_out)}; {why}."]
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    figures = {
        one.name: {"turns": one.turns, "before": one.loss_before, "after": one.loss_after} for one in contestants
    }
    (folder / f"{name}.json").write_text(json.dumps({"machine": told, "contestants": figures}, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(contestants) + 1))
    medians = [statistics.median(one.rates) for one in contestants]
    spread = [[m - min(c.rates) for m, c in zip(medians, contestants, strict=True)],
              [max(c.rates) - m for m, c in zip(medians, contestants, strict=True)]]  # fmt: skip
    colours = ["#1f77b4" if one.name.startswith("ftlab") else "#999999" for one in contestants]
    axes.barh([one.name for one in contestants], medians, xerr=spread, color=colours)
    axes.invert_yaxis()
    axes.set_xlabel("real tokens/s (median; min to max)")
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=120)
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="Alpaca rows, JSON")
    parser.add_argument("--tokenizer", type=Path, required=True, help="SentencePiece model of 32,000 tokens")
    parser.add_argument("--only", nargs="*", default=[], help="contestants whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each that count (default 3)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a turn (default 2)")
    parser.add_argument("--warmup", type=int, default=2, help="steps of the first turn (default 2)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows; packed layouts take half (default 8)")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/ftlab/benchmarks").expanduser())
    parser.add_argument("--name", default="cpu_peers", help="of the results (default cpu_peers)")
    parser.add_argument("--slow", action="store_true", help="peers in bfloat16 even where the CPU cannot multiply it")
    arguments = parser.parse_args()
    names, left_out = chosen(arguments)
    with tempfile.TemporaryDirectory() as folder:
        shared = prepare(arguments.rows.resolve(), arguments.tokenizer.resolve(), Path(folder), arguments.batch_size)
        contestants = []
        for name in names:
            contestants.append(Contestant(name, shared, arguments.cache))
            contestants[-1].turn(arguments.warmup, counts=False)
            print(f"{name}: loss {contestants[-1].loss_before:.4f}, warm", flush=True)
        for _ in range(arguments.rounds):
            for one in contestants:
                one.turn(arguments.steps, counts=True)
                print(f"{one.name}: {one.rates[-1]:,.0f} real tokens/s", flush=True)
        for one in contestants:
            one.end()
    before = [one.loss_before for one in contestants]
    if max(before) - min(before) > 0.02:
        raise SystemExit(f"the contestants do not begin with the same loss: {before}")
    write(arguments.name, contestants, left_out, arguments)


if __name__ == "__main__":
    main()
