"""``ftlab from-torchtune``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ftlab.verbs._types import whole

HELP = "the command for a configuration of torchtune"


def declare(parser: ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="of a full fine-tuning recipe of 0.6.1")
    parser.add_argument("overrides", nargs="*", help="key=value, as for tune run")
    parser.add_argument("--nproc-per-node", type=whole(1), metavar="N", help="as for tune run; default: all GPUs")
    parser.add_argument("--recipe", choices=("full_finetune_single_device", "full_finetune_distributed"))


def run(arguments: Namespace) -> None:
    from ftlab.lab.from_torchtune import as_script, from_torchtune

    given = {"recipe": arguments.recipe, "nproc_per_node": arguments.nproc_per_node}
    print(as_script(from_torchtune(arguments.config, arguments.overrides, **given), arguments.config))
