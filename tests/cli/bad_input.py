"""Fifty kinds of wrong input as a user makes them, and what has to be said of each."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SMALL = (
    *("model.dim=16", "model.n_heads=2", "model.n_layers=1", "model.ffn_hidden_dim=32", "seq_len=96"),
    *("dataset.max_samples=40", "trainer.max_steps=2", "evaluation.n_samples=1", "evaluation.max_new_tokens=2"),
    "device=cpu",
)
QUIET = ("logger=[console,jsonl]",)


@dataclass
class Place:
    """A folder to make one mistake in, and a finished run to make it with."""

    folder: Path
    finished: Path

    def run(self) -> Path:
        """A copy of the finished run, in ``outputs`` as it would be."""
        return shutil.copytree(self.finished, self.folder / "outputs" / "first", symlinks=True)

    def weights(self) -> Path:
        """A copy of its export."""
        return shutil.copytree(self.finished / "export", self.folder / "weights")

    def write(self, name: str, content: str | bytes) -> Path:
        """A file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def rows(self, *rows: object) -> list[str]:
        """The arguments of a run on these rows, one per line of a file; text stands there as it is."""
        lines = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
        joined = b"\n".join(line.encode() if isinstance(line, str) else line for line in lines)
        return on(self.write("rows.jsonl", joined + b"\n"))


def on(file: Path, *more: str) -> list[str]:
    return ["dataset=alpaca", "dataset.source=json", f"dataset.data_files={file}", "dataset.max_samples=null", *more]


def row(i: int = 0, **fields: Any) -> dict[str, Any]:
    return {"instruction": f"Count to {i}.", "input": "", "output": f"one to {i}"} | fields


@dataclass(frozen=True)
class Case:
    """One command.

    Attributes:
        typed: its arguments, or what makes them, given a `Place`.
        says: patterns that stderr must contain, in this order.
        env: variables to set; None takes one away.
        small: whether it is about a tiny run, whose arguments come first.
    """

    typed: Sequence[str] | Callable[[Place], Sequence[str]]
    says: Sequence[str]
    env: Mapping[str, str | None] = field(default_factory=dict)
    exit_code: int = 2
    small: bool = True
    logger: Sequence[str] = QUIET


def old_run(*more: str) -> Callable[[Place], list[str]]:
    """Go on with the finished run."""
    return lambda place: [f"resume={place.run()}", *more]


def only_unfinished(place: Place) -> list[str]:
    run = place.run()
    for step in (run / "checkpoints").iterdir():
        step.rename(step.with_name(f"{step.name}.tmp"))
    return [f"resume={run}"]


def nothing_at_all(place: Place) -> list[str]:
    (place.folder / "empty").mkdir()
    return [f"resume={place.folder / 'empty'}"]


def holding(name: str, content: bytes) -> Callable[[Place], list[str]]:
    """Weights of which one file holds something else."""

    def arguments(place: Place) -> list[str]:
        weights = place.weights()
        (weights / name).write_bytes(content)
        return [f"model.checkpoint={weights}", "tokenizer=tiny"]

    return arguments


def without(name: str) -> Callable[[Place], list[str]]:
    def arguments(place: Place) -> list[str]:
        weights = place.weights()
        (weights / name).unlink()
        return [f"model.checkpoint={weights}", "tokenizer=tiny"]

    return arguments


def missing_shard(place: Place) -> list[str]:
    weights = place.weights()
    (weights / "model.safetensors").rename(weights / "model-00001-of-00002.safetensors")
    names = {
        "model.norm.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    (weights / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return [f"model.checkpoint={weights}", "tokenizer=tiny"]


def with_tokenizer(name: str, content: bytes | None, kind: str) -> Callable[[Place], list[str]]:
    """A tokenizer's folder that holds only this."""

    def arguments(place: Place) -> list[str]:
        (place.folder / "tokenizer").mkdir()
        if content is not None:
            place.write(f"tokenizer/{name}", content)
        return [f"tokenizer={kind}", f"tokenizer.path={place.folder / 'tokenizer'}"]

    return arguments


def over_a_file(place: Place) -> list[str]:
    return [f"paths.output_dir={place.write('file', 'not a folder')}/run"]


def untrained_answers(place: Place) -> list[str]:
    """Conversations, two of which say that their answer is not to be learnt."""
    said = [{"role": "assistant", "content": "hello", "weight": 0 if i in (3, 7) else 1} for i in range(10)]
    chats = [{"messages": [{"role": "user", "content": f"hello {i}"}, answer]} for i, answer in enumerate(said)]
    file = place.write("chats.jsonl", "".join(json.dumps(chat) + "\n" for chat in chats))
    template = "dataset.template._target_=ftlab.data.templates.PlainTemplate"
    return [
        *("dataset=chat", "dataset.source=jsonl", f"dataset.data_files={file}", template),
        *("dataset.max_samples=null", "dataset.val_fraction=0"),
    ]


def long_rows(place: Place) -> list[str]:
    rows = [row(i, output="word " * (400 if i in (3, 7) else 1)) for i in range(10)]
    return [*place.rows(*rows), "dataset.too_long=error", "dataset.val_fraction=0"]


JSON_17 = [*(row(i) for i in range(16)), '{"instruction": "a", "input": "" "output": "b"}']
ROW_41 = [*(row(i) for i in range(41)), {"instruction": "a", "input": "", "outptu": "b"}]
LIST_5 = [*(row(i) for i in range(5)), row(5, output=["a"])]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 13476838914\n"
LATIN = [*(json.dumps(row(i)) for i in range(3)), b'{"instruction": "caf\xe9", "input": "", "output": "b"}']
RANK_0 = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
NO_KEY = {"WANDB_API_KEY": None, "NETRC": "/nonexistent"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}

CASES: dict[int, list[Case]] = {
    1: [Case(["optimzer.lr=1"], [r"^optimzer\.lr: unknown key; did you mean optimizer\.lr\?"])],
    2: [Case(["optimizer.lr=-1"], [r"^optimizer\.lr: must be > 0, got -1", "try: optimizer.lr="])],
    3: [Case(["optimizer.lr=abc"], [r"^optimizer\.lr: must be a number, got 'abc'"])],
    4: [Case([f"optimizer.lr={bad}"], [rf"^optimizer\.lr: must be finite, got {bad}"]) for bad in ("nan", "inf")],
    5: [Case(["seq_len=0"], [r"^seq_len: must be >= 1, got 0"])],
    6: [Case(["seq_len=9999"], [r"^seq_len: 9999 is more than .* 2048"])],
    7: [Case(["trainer.batch_size=0"], [r"^trainer\.batch_size: must be >= 1, got 0"])],
    8: [
        Case(
            [
                "parallelism=ddp",
                "parallelism.nproc_per_node=2",
                f"trainer.global_batch_size={size}",
                "trainer.batch_size=4",
            ],
            [rf"^trainer\.global_batch_size: {size} is not a multiple of .*= 4 × 2", f"try: .*={nearest}$"],
        )
        for size, nearest in ((10, 8), (12, "(8|16)"))
    ],
    9: [
        Case(["trainer.gradient_accumulation_steps=0"], [r"^trainer\.gradient_accumulation_steps: must be >= 1, got 0"])
    ],
    10: [
        Case(["trainer.epochs=1"], ["set exactly one of trainer.epochs and trainer.max_steps, both are: 1 and 2"]),
        Case(
            ["trainer.max_steps=null", "trainer.epochs=null"],
            ["set exactly one of trainer.epochs and trainer.max_steps"],
        ),
    ],
    11: [Case(["scheduler.warmup_steps=9"], [r"^scheduler\.warmup_steps: 9 is more than trainer\.max_steps = 2"])],
    12: [Case(["optimizer.betas=[0.9,1.5]"], [r"^optimizer\.betas\.1: must be in 0 <= beta < 1, got 1\.5"])],
    13: [Case(["precision=fp17"], ["^precision: has no option 'fp17'; choices: .*bf16.*fp32"])],
    14: [Case(["precision=fp8"], ["^precision.*fp8.*(choices|CUDA|GPU|Hopper)"])],
    15: [Case(["checkpoint.keep_last=0"], [r"^checkpoint\.keep_last: must be >= 1, got 0"])],
    16: [
        Case(over_a_file, [r"^paths\.output_dir: cannot write to .*/file/run: Not a directory \(ENOTDIR\)"]),
        Case(["paths.output_dir=/proc/ftlab/run"], [r"^paths\.output_dir: cannot write to /proc/ftlab/run: .*\(E"]),
    ],
    17: [
        Case(
            lambda place: [f"paths.output_dir={place.run()}"],
            [r"already holds the run 'llama_tiny' \([0-9a-f]{8}, completed\)", r"try: .*resume=.*/outputs/first"],
        )
    ],
    18: [
        Case(
            lambda place: [f"resume={place.run()}@50"], ["^resume: .* has no checkpoint step_00000050; .*steps 2", "@2"]
        )
    ],
    19: [
        Case(only_unfinished, ["^resume: .*no complete checkpoint; unfinished: step_00000002.tmp"]),
        Case(nothing_at_all, ["^resume: .*empty is no run's folder"]),
    ],
    20: [
        Case(
            lambda place: [f"model.checkpoint={place.weights()}", "model.ffn_hidden_dim=64", "tokenizer=tiny"],
            [r"^model\.ffn_hidden_dim: 64, but .* says 32; .*\(32, 16\).*\(64, 16\).*3 differ in shape"],
        ),
        Case(
            lambda place: [f"init_from={place.run()}", "model.dim=32"],
            [r"\(\d+, 16\).*\(\d+, 32\).*\d+ .*differ"],
        ),
    ],
    21: [
        Case(lambda place: [f"model.checkpoint={place.weights()}", "tokenizer=byte"], [r"259 .*\b640\b|\b640\b.* 259"]),
        Case(
            ["model.vocab_size=100"], [r"^model\.vocab_size: 100 is fewer than the 640 tokens", "model.vocab_size=null"]
        ),
    ],
    22: [
        Case(
            old_run("optimizer=sgd", "optimizer.lr=0.1"),
            [r"^optimizer\._target_: is 'torch\.optim\.AdamW' in this run", r"cannot go on.*\.SGD'", "init_from="],
            small=False,
        )
    ],
    23: [
        Case(
            old_run("precision=bf16"), ["param_dtype: is 'float32' in this run.*'bfloat16'", "init_from="], small=False
        )
    ],
    25: [Case(on(Path("/nowhere/rows.json")), [r"^dataset\.data_files: no such file or folder: /nowhere/rows\.json"])],
    26: [Case(lambda place: place.rows(*JSON_17), [r"rows\.jsonl:17:34: broken JSON"])],
    27: [Case(lambda place: place.rows(*ROW_41), [r"row 41 .*output.*found: instruction, input, outptu"])],
    28: [Case(lambda place: place.rows(*LIST_5), [r"field 'output'.*row 5 of .*must be text, but is list"])],
    29: [
        Case(lambda place: place.rows(), [r"rows\.jsonl.*no rows|no rows.*rows\.jsonl"]),
        Case(
            lambda place: [*place.rows(row(1), row(2)), "dataset.filter='len(output) > 100'"], [r"2 .*dataset\.filter"]
        ),
    ],
    30: [
        Case(
            long_rows,
            [r"2 of 10 train rows have more than seq_len=96 tokens, the longest 440 \(row 3\), and too_long=error"],
        )
    ],
    31: [Case(untrained_answers, [r"2 of 10 train rows: not one token is trained \(rows 3, 7\)"])],
    32: [Case(lambda place: place.rows(*LATIN), [r"rows\.jsonl is not UTF-8: byte 0xe9 at byte offset \d+"])],
    33: [
        Case(lambda place: place.rows('{"a": 1, "a": 2}'), [r"rows\.jsonl:1:10: the key 'a' stands twice"]),
        Case(lambda place: place.rows('{"a": NaN}'), [r"rows\.jsonl:1:7: NaN is not JSON, in the key 'a'"]),
    ],
    34: [
        Case(
            with_tokenizer("x", None, "sentencepiece"),
            [r"^tokenizer\.path: .*holds no tokenizer\.model; it holds nothing"],
        ),
        Case(with_tokenizer("tokenizer.model", b"\x0a\x0e\x0a", "sentencepiece"), [r"tokenizer\.model"]),
        Case(with_tokenizer("tokenizer.json", b'{"version": "1.0", "mo', "huggingface"), [r"tokenizer\.json"]),
    ],
    36: [
        Case(holding("model.safetensors", struct.pack("<Q", 2**63) + b"{}" * 40), [r"model\.safetensors \(88 bytes\)"]),
        Case(holding("model.safetensors", struct.pack("<Q", 8) + b"{not js}"), [r"model\.safetensors \(16 bytes\)"]),
    ],
    37: [Case(missing_shard, [r"lacks model-00002-of-00002\.safetensors"])],
    38: [Case(holding("model.safetensors", LFS), ["is a git-LFS pointer of 136 bytes", "lfs pull"])],
    39: [
        Case(
            ["model=llama2_7b"],
            ["meta-llama/Llama-2-7b", r"model\.checkpoint=/path/to/folder"],
            env=OFFLINE,
            small=False,
        ),
        Case(["dataset=alpaca", "dataset.max_samples=4"], ["tatsu-lab/alpaca", "dataset.data_files="], env=OFFLINE),
    ],
    40: [
        Case(
            ["device=cuda"],
            ["^device: cuda was asked for, but torch .* finds no CUDA device"],
            env={"CUDA_VISIBLE_DEVICES": ""},
        )
    ],
    41: [
        Case(
            [
                *("trainer.batch_size=39", "model.ffn_hidden_dim=4000000", "precision=bf16", "optimizer=sgd"),
                "parallelism.activation_checkpointing=full",
            ],
            [
                r"memory: each rank needs [\d.]+ GiB \(weights .*, gradients .*, optimizer state ",
                r"\), but .* available",
            ],
        )
    ],
    42: [
        Case(["parallelism=ddp"], ["^MASTER_PORT: .*"], env=RANK_0 | {"MASTER_PORT": "BUSY"}),
        Case(
            ["parallelism=ddp"],
            ["^RANK: 2 is not below WORLD_SIZE=2"],
            env=RANK_0 | {"RANK": "2", "MASTER_PORT": "29511"},
        ),
        Case(["parallelism=ddp"], ["^MASTER_PORT: is not set, though RANK=0 is"], env=RANK_0),
        Case(
            ["parallelism=ddp"],
            ["^WORLD_SIZE: must be a whole number, got 'two'"],
            env=RANK_0 | {"WORLD_SIZE": "two", "MASTER_PORT": "29511"},
        ),
    ],
    43: [
        Case(
            [],
            ["^W&B: offline, no API key; upload later: wandb sync"],
            env=NO_KEY | {"WANDB_MODE": None},
            exit_code=0,
            logger=(),
        ),
        Case(
            [],
            ["^W&B: offline, WANDB_MODE='bad' is none of online"],
            env=NO_KEY | {"WANDB_MODE": "bad"},
            exit_code=0,
            logger=(),
        ),
    ],
    44: [
        Case(["optimizer=sgd", "optimizer=adamw"], ["^optimizer: two options are given"]),
        Case(["+optimizer=sgd"], ["^optimizer: .*second optimizer"]),
        Case(["optimizer.lr='???'"], [r"^optimizer\.lr: must be given"]),
    ],
    45: [
        Case(["seed=${seq_len}", "seq_len=${seed}"], ["seed -> seq_len -> seed"]),
        Case(["optimizer.lr=${trainer.lr}"], [r"optimizer\.lr -> trainer\.lr"]),
    ],
    46: [
        Case(
            ["loss._target_=os.system"],
            [r"^loss\._target_: 'os\.system' is not in the allowlist: allowed are .*ftlab\.\{data,"],
        )
    ],
    47: [Case([f"seed={bad}"], [rf"^seed: must be in 0 <= seed < 2\*\*63, got {bad}"]) for bad in (-1, 2**63)],
    48: [
        Case(
            ["model.n_layers=200", "model.dim=65536", "model.ffn_hidden_dim=262144"],
            [r"need [\de.+]+ GiB, but .* has [\d.]+ GiB free"],
        )
    ],
}
