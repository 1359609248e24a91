"""A checkpoint of a run as a folder that others open."""

from __future__ import annotations

from pathlib import Path

from ftlab.assembly import build_model, weights_of, with_vocabulary
from ftlab.config.build import build
from ftlab.config.resume import upgraded
from ftlab.distributed.env import pick_device
from ftlab.distributed.precision import Precision
from ftlab.distributed.single import OneRank
from ftlab.errors import ConfigError
from ftlab.models.auto import find_model
from ftlab.storage.addresses import candidates, find_run
from ftlab.storage.checkpoints import verify
from ftlab.training.checkpoint import open_checkpoint
from ftlab.training.export import Proof, export_model

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export(address: str, out: Path, dtype: str | None, layout: str) -> Proof:
    """Write the checkpoint at ``address`` to ``out`` and prove that it reads back as what was trained.

    In one process on the CPU, whatever the run was trained on. Memory: the model and the rows of one tensor.

    Args:
        address: RUN, RUN@STEP, RUN@best or RUN/checkpoints/step_N.
        dtype: fp32, bf16 or fp16; null: what the weights were trained in.
        layout: ``hf`` or ``meta``.

    Raises:
        ConfigError: there is no such checkpoint, or ``out`` exists.
        CheckpointError: it is damaged.
        ExportError: what was written does not read back as what was trained.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("OUT", f"{out} exists already", f"{out}_2")
    at = find_run(address, "RUN")
    found = candidates(at)[0]
    manifest = verify(found, None)
    opened = open_checkpoint(found.path)
    config = upgraded(opened.told["config"], at.run)
    tokenizer = build(config["tokenizer"])
    trained: Precision = build(config["precision"])
    plain = Precision(param_dtype=trained.param_dtype, compute_dtype=trained.param_dtype, loss_scaling=False)
    files = Precision(param_dtype=DTYPES[dtype], compute_dtype=DTYPES[dtype], loss_scaling=False) if dtype else trained
    parallel = OneRank(pick_device("cpu"))
    model_config, _ = find_model(build(config["model"]), fetch=False)
    model = build_model(with_vocabulary(model_config, None, tokenizer, opened), weights_of(opened), plain, parallel)
    return export_model(
        model,
        tokenizer,
        out,
        dtype=files.weights,
        precision=plain,
        parallel=parallel,
        about={"run": manifest.run, "step": manifest.step, "checkpoint": manifest.digest},
        layout=layout,
    )
