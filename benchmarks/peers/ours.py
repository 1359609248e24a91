"""ftlab itself as a contestant: what ``train.py`` would run, with a step's log line as the place to stand still."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.peers.pacer import Pacer
from benchmarks.peers.rows import probe, read_rows
from ftlab.assembly.data import read_data
from ftlab.assembly.model import weights_in
from ftlab.assembly.run import assemble_run
from ftlab.config.build import build
from ftlab.config.check import compose_config
from ftlab.distributed.env import WorkerEnv
from ftlab.models.auto import find_model
from ftlab.training.loop import fit


class NoTurnLeftError(Exception):
    """Ends ``fit`` between two steps."""


def main(setting: dict[str, Any]) -> None:
    pacer = Pacer()
    config = compose_config([*setting["overrides"], *setting["more"]])
    tokenizer, worker = build(config["tokenizer"]), WorkerEnv.here(config["device"])
    model_config, folder = find_model(build(config["model"]), fetch=True)
    assert folder is not None
    data = read_data(config, tokenizer)
    seen = {"tokens": 0}

    def log(line: Mapping[str, float], step: int) -> None:  # noqa: ARG001 -- a logger's signature
        pacer.step_done(int(line["tokens"]) - seen["tokens"], line["train/loss"])
        seen["tokens"] = int(line["tokens"])
        if pacer.over:
            raise NoTurnLeftError

    run = assemble_run(config, model_config, weights_in(folder), data.loader, None, log, worker)
    rows = read_rows(setting["rows"])
    pacer.ready(probe(run.state.model, rows))
    try:
        fit(run)
    except NoTurnLeftError:
        pacer.finish(probe(run.state.model, rows))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
