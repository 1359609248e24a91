"""What the loop needs, from a configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

import torch

from ftlab.assembly.data import is_packed
from ftlab.assembly.model import Fill, build_model
from ftlab.config.build import Config, build
from ftlab.data.cache import cache_folder, cached, key_of
from ftlab.data.loader import BatchLoader
from ftlab.distributed.base import Strategy
from ftlab.distributed.env import WorkerEnv, keep_freed_memory, peak_flops, return_freed_memory
from ftlab.distributed.fsdp import Shards
from ftlab.distributed.precision import Precision
from ftlab.losses import Loss
from ftlab.models import cpu_kernel
from ftlab.models.auto import AnyModelConfig
from ftlab.models.compiled import compile_blocks
from ftlab.models.cpu_attention import attend_with
from ftlab.optim.groups import decay_groups
from ftlab.training import rng
from ftlab.training.evaluate import Evaluator
from ftlab.training.guard import StepGuard
from ftlab.training.metrics import training_flops
from ftlab.training.run import Run
from ftlab.training.state import TrainState
from ftlab.training.trainer_config import TrainerConfig

_log = logging.getLogger(__name__)


def assemble_run(
    config: Config,
    model_config: AnyModelConfig,
    fill: Fill,
    deal: Callable[..., BatchLoader],
    evaluator: Evaluator | None,
    log: Callable[[Mapping[str, float], int], None],
    worker: WorkerEnv,
    global_batch_size: int | None = None,
) -> Run:
    """What the loop needs to train ``model_config`` as ``config`` says.

    Args:
        fill: gives the parameters their values.
        deal: makes the loader of one rank (``TrainingData.loader``).
        global_batch_size: of a run that goes on, which fixes the order of its rows; null: the configuration's.
    """
    rng.seed(config["seed"])
    trainer: TrainerConfig = build(config["trainer"])
    precision: Precision = build(config["precision"])
    strategy: Strategy = build(config["parallelism"])
    parallel = strategy.start(worker, precision)
    if worker.device.type == "cpu":
        return_freed_memory() if isinstance(parallel, Shards) else keep_freed_memory()
    if global_batch_size is not None:
        trainer = trainer.with_global_batch_size(global_batch_size, parallel.dp_size)
    trainer.require_one_micro_batch(parallel.dp_size)
    loader = deal(
        batch_size=trainer.batch_size,
        gradient_accumulation_steps=trainer.accumulation_steps(parallel.dp_size),
        dp_rank=parallel.dp_rank,
        dp_size=parallel.dp_size,
        share_prefixes=trainer.share_prefixes,
    )
    model = build_model(model_config, fill, precision, parallel)
    loss: Loss = build(config["loss"])
    if config["compile"]:
        # Packed rows are all as long, and an epoch's last batch has fewer of them. Kernels for any number are as
        # quick on a CPU, where another compilation would take 15 s; on CUDA that was not measured.
        varying = not is_packed(config) or worker.device.type == "cpu"
        compile_blocks(model, varying=varying, batch_size=1 if trainer.share_prefixes else trainer.batch_size)
        loss = loss.compiled()
    if worker.device.type == "cpu":
        attend_with(_own_kernel(config["paths"]["cache_dir"]) if config["compile"] else None)
    optimizer: torch.optim.Optimizer = build(config["optimizer"])(decay_groups(model))
    schedule = build(config["scheduler"], total_steps=trainer.total_steps(loader.steps_per_epoch))
    scaler = precision.grad_scaler(parallel.device)
    state = TrainState(
        model=model,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
        scaler=scaler,
        guard=StepGuard(
            optimizer, scaler, parallel, max_skipped=trainer.max_skipped_steps, spike_sigma=trainer.spike_sigma
        ),
    )
    return Run(
        trainer=trainer,
        state=state,
        loader=loader,
        loss=loss,
        precision=precision,
        parallel=parallel,
        evaluator=evaluator,
        log=log,
        step_flops=_flops_counter(model_config),
        peak_flops=peak_flops(parallel.device, precision.compute),
    )


def _own_kernel(cache_dir: str | None) -> cpu_kernel.DocumentKernel | None:
    """The attention kernel compiled for this machine; None, and a warning, where that cannot be."""
    try:
        key = key_of(cpu_kernel.decided_by())
        folder = cached(cache_folder(cache_dir), "kernels", key, cpu_kernel.compile_into)
        return cpu_kernel.DocumentKernel(folder)
    except (cpu_kernel.CompilerError, OSError) as error:  # another compiler than GCC; a cache that must not be run from
        _log.warning("attention: torch's kernel, for ours cannot be had here: %s", error)
        return None


def _flops_counter(model: AnyModelConfig) -> Callable[[list[int], int], float]:
    """FLOPs of one forward and backward, by the real lengths of the sequences and how many tokens they share."""
    assert model.head_dim is not None  # ModelConfig resolved it
    return partial(
        training_flops,
        model.n_matmul_params(),
        model.n_layers,
        model.n_heads * model.head_dim,
    )
