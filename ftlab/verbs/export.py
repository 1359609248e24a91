"""``ftlab export``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

HELP = "a checkpoint as a Hugging Face folder, read back and compared"


def declare(parser: ArgumentParser) -> None:
    parser.add_argument("run", help="RUN, RUN@STEP, RUN@best or RUN/checkpoints/step_N")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the files; default: the weights' own")
    parser.add_argument("--layout", choices=("hf", "meta"), default="hf", help="Hugging Face's (default) or Meta's")


def run(arguments: Namespace) -> None:
    from ftlab.lab.export import export

    proof = export(arguments.run, arguments.out, arguments.dtype, arguments.layout)
    print(f"{arguments.out}: read back; largest difference of a logit {proof.max_abs_diff:.3g}", end="")
    print(f" (logits up to {proof.max_abs_logit:.3g}), every tensor equal to the bit")
