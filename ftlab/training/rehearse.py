"""A run's first steps on tensors that have shapes and no data: what they take of memory, before any of it is taken.

It is the run's own code that is rehearsed, `train_step` and the strategy's sharding included, so whatever is
changed there is in the figures by itself; only what needs numbers has a stand-in. Billions of parameters take seconds.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ftlab.data.batch import Batch
from ftlab.data.weights import ONE
from ftlab.distributed.base import Parallelism, Strategy
from ftlab.distributed.ddp import Replicas
from ftlab.distributed.env import WorkerEnv
from ftlab.distributed.fsdp import Shards
from ftlab.distributed.precision import Precision
from ftlab.losses import Loss
from ftlab.models.config import ModelConfig
from ftlab.models.cpu_products import WidenedProducts, is_widened
from ftlab.models.layers import KVCache
from ftlab.models.live_bytes import LiveBytes, Phase, cuda_peaks, heap_peak, live_peaks
from ftlab.models.transformer import Transformer
from ftlab.optim.groups import decay_groups
from ftlab.prefixes import Take, Tree
from ftlab.shapes import rounded_up
from ftlab.training.generate import _last_logits
from ftlab.training.loop import train_step
from ftlab.training.run import Run
from ftlab.training.stand_ins import (
    BlindGuard,
    BlindInBackward,
    Buckets,
    WithoutData,
    fused_norms,
    local_rows,
    without_data,
)
from ftlab.training.state import TrainState
from ftlab.training.trainer_config import TrainerConfig
from ftlab.training.wishes import deferring_signals

# Beside tensors: code of kernels that is paged in, their packing buffers, threads' stacks. Measured: 10 to 40 MiB.
PROCESS_BYTES = 32 * 2**20
_PAGE = 4096
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The largest tensors of rows that a run meets: (sequences, tokens).

    Attributes:
        training: a micro-batch on one rank.
        n_micro_batches: of an optimizer step.
        evaluation: a batch of validation rows; None without validation.
        answers: prompts that are answered at once; tokens are prompt and answer together.
    """

    training: tuple[int, int]
    n_micro_batches: int
    evaluation: tuple[int, int] | None
    answers: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Bytes on one rank.

    Attributes:
        stretches: of the run in their order, and the most that is live at once in each: (phase, bytes). What is kept
            on the host, where that is not the device, is taken off.
        weights, gradients, optimizer_state: what is kept from step to step, or within one.
        peak: of the whole run as it is measured: what torch's allocator gave out on CUDA, the growth of the resident
            set on a CPU.
    """

    stretches: tuple[tuple[str, int], ...]
    weights: int
    gradients: int
    optimizer_state: int
    peak: int

    @cached_property
    def phases(self) -> dict[str, int]:
        """Most that is live at once in each phase of a run.

        They are load, first forward and backward, first optimizer step, later steps, evaluation, save.
        """
        most = dict.fromkeys((phase for phase, _ in self.stretches), 0)
        for phase, n_bytes in self.stretches:
            most[phase] = max(most[phase], n_bytes)
        return most

    def towards(self, other: Rehearsal, times: float) -> Rehearsal:
        """So many ``times`` as far from this as ``other`` is, in every figure."""

        def along(first: int, second: int) -> int:
            return round(first + times * (second - first))

        return Rehearsal(
            stretches=tuple(
                (phase, along(first, second))
                for (phase, first), (_, second) in zip(self.stretches, other.stretches, strict=True)
            ),
            weights=along(self.weights, other.weights),
            gradients=along(self.gradients, other.gradients),
            optimizer_state=along(self.optimizer_state, other.optimizer_state),
            peak=along(self.peak, other.peak),
        )


def rehearse(
    model_config: ModelConfig,
    *,
    precision: Precision,
    strategy: Strategy,
    n_ranks: int,
    n_local_ranks: int,
    optimizer: Callable[..., torch.optim.Optimizer],
    loss: Loss,
    max_grad_norm: float | None,
    optimizer_in_backward: bool,
    share_prefixes: bool,
    shapes: Shapes,
    on_cuda: bool,
) -> Rehearsal:
    """Rehearse rank 0 of a run on CPU tensors without data.

    Args:
        n_ranks, n_local_ranks: the others exist in name only. There must be no process group yet.
        share_prefixes: rehearsed with batches of which nothing can be shared.
        on_cuda: what the figures are for; the kernels rehearsed are the CPU's, whose results have the same sizes, but
            for norms, which have a stand-in.
    """
    worker = WorkerEnv(
        rank=0, local_rank=0, world_size=n_ranks, local_world_size=n_local_ranks, device=_CPU, in_name_only=True
    )
    with torch.device("meta"):
        model = model_config.build().to(precision.weights)
    live = LiveBytes()
    with deferring_signals(), _group_of_its_own(), ExitStack() as stack:
        parallel = strategy.start(worker, precision)
        if isinstance(parallel, Replicas):
            parallel = Buckets(parallel)
        stack.enter_context(WithoutData())
        without_data(model)
        parallel.place(model)
        stack.enter_context(live)
        if on_cuda:
            stack.enter_context(fused_norms())
        elif is_widened(precision.compute):
            stack.enter_context(WidenedProducts(precision.compute))
        live.enter("load")
        live.hold([*model.parameters(), *model.buffers()])
        if model_config.checkpoint is not None:
            torch.empty_like(max((local_rows(p) for p in model.parameters()), key=Tensor.numel))  # one tensor's bytes
        run = _run(model, precision, parallel, optimizer, loss, max_grad_norm, optimizer_in_backward)
        run.clock.on_enter = live.enter
        gradients = _GradientBytes(model, kept=not optimizer_in_backward)
        _cut_backward(model, live)
        make_batch = _folded if share_prefixes else _batch
        first_phase_of = {"load": 0}
        for step in ("first step", "later steps"):
            first_phase_of[step] = len(live.phases)
            train_step(run, [make_batch(shapes.training)] * min(shapes.n_micro_batches, 2))
        first_phase_of["evaluation"] = len(live.phases)
        _evaluate(run, shapes, live)
        first_phase_of["save"] = len(live.phases)
        live.enter("save")
        state = run.state.optimizer.state.values()
        kept = [value for values in state for value in values.values() if isinstance(value, Tensor)]
        weights, optimizer_state = sum(map(_n_bytes, model.parameters())), sum(map(_n_bytes, kept))
        offloads = on_cuda and getattr(strategy, "cpu_offload", False)
        on_host = weights + gradients.total + optimizer_state if offloads else 0  # what is kept is kept there
        peaks = [peak - on_host for peak in (cuda_peaks if on_cuda else live_peaks)(live.phases)]
        if on_cuda:
            peak = max(peaks)
        elif isinstance(parallel, Shards):  # whose blocks go back to the kernel
            peak = max(live_peaks(live.phases, _PAGE)) + PROCESS_BYTES
        else:
            peak = heap_peak(live.phases) + PROCESS_BYTES
    return Rehearsal(
        stretches=tuple(zip(_parts(live.phases, first_phase_of), peaks, strict=True)),
        weights=weights,
        gradients=gradients.total,
        optimizer_state=optimizer_state,
        peak=peak,
    )


def _parts(phases: list[Phase], first_phase_of: dict[str, int]) -> Iterator[str]:
    """Which phase that a user is told of each of ``phases`` belongs to."""
    starts = list(first_phase_of.items())
    for i, phase in enumerate(phases):
        part = next(name for name, start in reversed(starts) if i >= start)
        if part == "first step":
            part = "first optimizer step" if phase.name == "optimizer" else "first forward and backward"
        yield part


def _cut_backward(model: Transformer, live: LiveBytes) -> None:
    """Make stretches of their own of the backward through head, blocks and embedding.

    In each of them the most that is live grows evenly with the number of blocks: gradients of more blocks may
    outgrow the logits, but within one stretch nothing overtakes.
    """

    def cut(hidden: Tensor) -> None:
        if hidden.requires_grad:
            hidden.register_hook(lambda _: live.enter("backward"))

    model.norm.register_forward_pre_hook(lambda _, inputs: cut(inputs[0]))
    model.embedding.register_forward_hook(lambda _, __, hidden: cut(hidden))


def _run(
    model: Transformer,
    precision: Precision,
    parallel: Parallelism,
    optimizer: Callable[..., torch.optim.Optimizer],
    loss: Loss,
    max_grad_norm: float | None,
    optimizer_in_backward: bool,
) -> Run:
    """What `train_step` needs."""
    shards: dict[Tensor, Tensor] = {
        p: nn.Parameter(local_rows(p).detach()) if isinstance(p, DTensor) else p for p in model.parameters()
    }
    groups = [group | {"params": [shards[p] for p in group["params"]]} for group in decay_groups(model)]
    update = optimizer(groups)
    if isinstance(update, torch.optim.SGD):  # its fused kernel is one that needs data; the loop's state is the same
        for group in update.param_groups:
            group |= {"fused": False, "foreach": False}
    trainer = TrainerConfig(
        epochs=None,
        max_steps=2,
        max_steps_per_epoch=None,
        batch_size=1,
        gradient_accumulation_steps=1,
        global_batch_size=None,
        max_grad_norm=max_grad_norm,
        measure_lost_updates=False,
        profile_steps=None,
        optimizer_in_backward=False,  # what stands in for it is made below
        share_prefixes=False,
        log_every_steps=1,
        max_skipped_steps=0,
        spike_sigma=None,
    )
    scaler = precision.grad_scaler(_CPU)
    guard: Any = BlindGuard(update, scaler, shards)
    no_loader: Any = None
    run = Run(
        trainer=trainer,
        state=TrainState(
            model=model,
            optimizer=update,
            scheduler=torch.optim.lr_scheduler.LambdaLR(update, lambda _: 1.0),
            scaler=scaler,
            guard=guard,
        ),
        loader=no_loader,
        loss=loss,
        precision=precision,
        parallel=parallel,
        evaluator=None,
        log=lambda *_: None,
        step_flops=lambda *_: 0.0,
        peak_flops=1.0,
    )
    if optimizer_in_backward:
        run.update = BlindInBackward(update, shards)
    return run


class _GradientBytes:
    """Adds up the gradients of a model as they are first made; those that are not kept: the largest."""

    def __init__(self, model: nn.Module, *, kept: bool):
        self.total, self._kept = 0, kept
        self._handles: dict[Tensor, Any] = {
            p: p.register_post_accumulate_grad_hook(self._count) for p in model.parameters()
        }

    def _count(self, parameter: Tensor) -> None:
        if (handle := self._handles.pop(parameter, None)) is not None:
            handle.remove()
            size = _n_bytes(parameter)  # gradients have the shape, dtype and shards of their parameters
            self.total = self.total + size if self._kept else max(self.total, size)


def _evaluate(run: Run, shapes: Shapes, live: LiveBytes) -> None:
    model = run.state.model
    model.eval()
    live.enter("evaluation")
    with torch.no_grad(), run.precision.autocast(_CPU):
        if shapes.evaluation is not None:
            batch = _batch(shapes.evaluation)
            model(batch.tokens, batch.targets, run.loss)
        if shapes.answers is not None:
            n_rows, length = shapes.answers
            cache = KVCache(model.config.n_layers, capacity=length)
            live.enter("prompts")
            _last_logits(model, torch.zeros(n_rows, length - 1, dtype=torch.int64), cache)
            live.enter("one token more")
            _last_logits(model, torch.zeros(n_rows, 1, dtype=torch.int64), cache)
    model.train()


def _batch(shape: tuple[int, int]) -> Batch:
    n_rows, length = shape
    return Batch(
        tokens=torch.zeros(shape, dtype=torch.int64),
        targets=torch.zeros(shape, dtype=torch.int64),
        sample_ids=list(range(n_rows)),
        lengths=[length] * n_rows,
        n_targets=n_rows * length,
        total_weight=n_rows * length * ONE,
    )


def _folded(shape: tuple[int, int]) -> Batch:
    """The same, folded, of samples that have nothing in common."""
    batch = _batch(shape)
    targets = batch.targets.flatten()
    nodes = targets.new_zeros(rounded_up(len(targets)))
    tree = Tree(
        n_nodes=len(targets),
        tokens=Take(rows=targets, places=targets, begins=nodes),
        nodes=Take(rows=nodes, places=nodes, begins=targets),
        parents=Take(rows=targets, places=targets, begins=nodes),
    )
    weights = torch.zeros(targets.shape, dtype=torch.float32)
    return replace(batch, tokens=nodes[None], targets=targets, weights=weights, doc_ids=targets[None], tree=tree)


def _n_bytes(tensor: Tensor) -> int:
    local = local_rows(tensor)
    return local.numel() * local.itemsize


@contextmanager
def _group_of_its_own() -> Iterator[None]:
    """Leaves no process group behind, so that the run itself can make one."""
    assert not dist.is_initialized(), "a rehearsal comes before the run's own process group"
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            # Groups are known by numbers that begin anew: one that is collected later would take the run's own with it.
            gc.collect()
