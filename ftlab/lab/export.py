"""A checkpoint of a run as a folder that others open."""

from __future__ import annotations

from pathlib import Path

from ftlab.assembly.model import build_model, weights_of, with_vocabulary
from ftlab.config.build import build
from ftlab.config.resume import todays_config
from ftlab.distributed.env import pick_device
from ftlab.distributed.precision import Precision
from ftlab.distributed.single import OneRank
from ftlab.errors import ConfigError
from ftlab.lab.runs import RunRecord
from ftlab.lab.trained import find_checkpoint
from ftlab.loggers.base import RunInfo
from ftlab.models.auto import find_model
from ftlab.outputs.secrets import mask_secrets
from ftlab.storage.checkpoints import verify
from ftlab.training.card import model_card
from ftlab.training.export import Proof, export_model
from ftlab.training.opened import Opened, open_checkpoint
from ftlab.training.state import Progress

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
    found = find_checkpoint(address)
    manifest = verify(found, None)
    opened, run = open_checkpoint(found.path), RunRecord(found.path.parent.parent)
    config = todays_config(opened.told["config"], run.folder, found.path, to_build=("model", "tokenizer", "precision"))
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
        end_ids=opened.end_ids or [tokenizer.eos_id],
        about={"run": manifest.run, "step": manifest.step, "checkpoint": manifest.digest},
        card=_card(run, opened, trained) if layout == "hf" else None,
        layout=layout,
    )


def _card(run: RunRecord, opened: Opened, precision: Precision) -> str:
    """The card that the run itself puts into its export, as of this checkpoint."""
    config, progress = opened.told["config"], Progress(**opened.told["progress"])
    metrics: dict[str, float] = {}
    for row in run.metrics:
        if row["step"] <= progress.step:
            metrics |= {key: value for key, value in row.items() if value is not None}
    weights = run.part("weights")
    info = RunInfo(
        folder=run.folder,
        run_id=run.id,
        first_step=0,
        logged_until=0,
        name=config["run_name"],
        config=mask_secrets(config),
        seed=config["seed"],
        total_steps=progress.step,
        global_batch_size=run.record.get("global_batch_size", 0),
        model="",
        n_params=run.record.get("n_params", 0),
        weights=weights.get("checkpoint"),
        dataset=config["dataset"].get("source", "mixture"),
        n_train_samples=run.record.get("n_train_samples", 0),
        n_val_samples=0,
        device=str(run.record.get("device", "unknown")),
        precision=f"{precision.param_dtype} weights, {precision.compute_dtype} arithmetic",
        next_commands=(),
    )
    return model_card(info, progress, metrics, commit=weights.get("commit"))
