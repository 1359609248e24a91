"""A training state as named tensors and JSON, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ftlab.errors import CheckpointError
from ftlab.models.row_files import StoredRows
from ftlab.models.weights import assign
from ftlab.training.state import Progress, TrainState

_MODEL, _OPTIMIZER = "model.", "optimizer."
_CPU = torch.device("cpu")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, and the buffers that belong to the model's state, under the names that checkpoints use."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {_MODEL + name: tensor.detach() for name, tensor in (dict(model.named_parameters()) | buffers).items()}


def tensors(state: TrainState) -> dict[str, Tensor]:
    """All tensors of model and optimizer, whole or sharded, by name; views, not copies."""
    named = model_tensors(state.model)
    for name, _, values in _optimizer_entries(state):
        named |= {f"{_OPTIMIZER}{name}.{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    return named


def non_finite(state: TrainState) -> list[str]:
    """Names of the tensors of which this rank's rows hold a NaN or an infinity. Waits for the device."""
    local = {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors(state).items()
        if tensor.is_floating_point()
    }
    # A sum is not finite if a part of it is not: the one pass over memory that is needed. Finite parts may overflow it.
    sums = {name: tensor.sum(dtype=torch.float32) for name, tensor in local.items()}
    suspects: set[str] = set()
    for device in {total.device for total in sums.values()}:  # one answer from each is waited for
        there = [name for name, total in sums.items() if total.device == device]
        fine = torch.stack([sums[name] for name in there]).isfinite().tolist()
        suspects |= {name for name, is_fine in zip(there, fine, strict=True) if not is_fine}
    return [name for name, tensor in local.items() if name in suspects and not bool(tensor.isfinite().all())]


def facts(state: TrainState) -> dict[str, Any]:
    """All that is not a tensor, as JSON; floats survive it to the bit."""
    others = {}
    for name, _, values in _optimizer_entries(state):
        if plain := {key: value for key, value in values.items() if not isinstance(value, Tensor)}:
            others[name] = plain
    return {
        "progress": asdict(state.progress),
        "scheduler": {"steps": state.scheduler.last_epoch, "lr": state.scheduler.get_last_lr()},
        "scaler": state.scaler.state_dict(),
        "guard": state.guard.state_dict(),
        "optimizer": {
            "class": _class_name(state.optimizer),
            "values": others,
            "groups": [
                {key: group[key] for key in _counted(state.optimizer)} for group in state.optimizer.param_groups
            ],
            "average": getattr(state.optimizer, "average", None),
        },
    }


def restore(state: TrainState, stored: Mapping[str, StoredRows], told: Mapping[str, Any], source: object) -> None:
    """Make ``state`` what `tensors` and `facts` were taken from, each rank reading its own rows.

    The optimizer keeps its settings (lr, betas...), which are the configuration's; so does the schedule, a function
    of the step. What they have become through training is restored.

    Args:
        state: freshly built, its parameters allocated.
        source: where it comes from, for errors.

    Raises:
        CheckpointError: naming the first tensor that does not fit; nothing has been changed then.
    """
    named = model_tensors(state.model)
    _compare(named, {name: rows for name, rows in stored.items() if name.startswith(_MODEL)}, source)
    _same_optimizer(state, told, source)
    for name, tensor in named.items():
        assign(tensor, stored[name])
    restore_optimizer(state, stored, told, source)
    state.progress.__dict__.update(asdict(Progress(**told["progress"])))
    _seek(state.scheduler, told["scheduler"]["steps"])
    if told["scaler"] and state.scaler.is_enabled():
        state.scaler.load_state_dict(dict(told["scaler"]))
    if "guard" in told:
        state.guard.load_state_dict(told["guard"])


def restore_weights(
    model: nn.Module, stored: Mapping[str, StoredRows], told: Mapping[str, Any], source: object
) -> None:
    """Only the model's part of `restore`: what was learnt, where the optimizer trains another point than it answers."""
    named = model_tensors(model)
    _compare(named, {name: rows for name, rows in stored.items() if name.startswith(_MODEL)}, source)
    for name, tensor in named.items():
        assign(tensor, stored[name])
    state, weight = told["optimizer"].get("average") or (None, 0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (rows := stored.get(f"{_OPTIMIZER}{name}.{state}")) is not None:
                parameter.lerp_(_state_tensor(parameter, rows), weight)


def restore_optimizer(
    state: TrainState, stored: Mapping[str, StoredRows], told: Mapping[str, Any], source: object
) -> None:
    """Only the optimizer's part of `restore`, for a new run that goes on with its moments."""
    _same_optimizer(state, told, source)
    _restore_optimizer(state, stored, told["optimizer"]["values"])
    counted = _counted(state.optimizer)
    for group, then in zip(state.optimizer.param_groups, told["optimizer"].get("groups", []), strict=False):
        group.update({key: then[key] for key in counted})


def _same_optimizer(state: TrainState, told: Mapping[str, Any], source: object) -> None:
    if told["optimizer"]["class"] != _class_name(state.optimizer):
        raise CheckpointError(
            source,
            f"was trained with {told['optimizer']['class']}, but the configuration says {_class_name(state.optimizer)}",
            "a new run from its weights alone: init_from=RUN, without init_optimizer",
        )


def _counted(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Settings of groups that training changes: not the configuration's to say."""
    return getattr(optimizer, "counted", ())


def _optimizer_entries(state: TrainState) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Parameter's name, its number in the optimizer, and its entry there."""
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    number = 0
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            # Sorted: their order depends on whether the entry was made by a step or restored, and files should not.
            yield names[parameter], number, dict(sorted(state.optimizer.state.get(parameter, {}).items()))
            number += 1


def _restore_optimizer(
    state: TrainState, stored: Mapping[str, StoredRows], plain: Mapping[str, Mapping[str, Any]]
) -> None:
    parameters = dict(state.model.named_parameters())
    entries: dict[int, dict[str, Any]] = {}
    for name, number, _ in _optimizer_entries(state):
        prefix = f"{_OPTIMIZER}{name}."
        parameter = parameters[name]
        entry: dict[str, Any] = dict(plain.get(name, {}))
        for full, rows in stored.items():
            if full.startswith(prefix) and "." not in full.removeprefix(prefix):
                entry[full.removeprefix(prefix)] = _state_tensor(parameter, rows)
        if entry:
            entries[number] = entry
    # load_state_dict knows on which device and in which dtype each optimizer wants its counters.
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _state_tensor(parameter: Tensor, rows: StoredRows) -> Tensor:
    """One tensor of an optimizer's entry: divided like its parameter where it has as many rows, else whole."""
    like = parameter.detach()
    if rows.shape == tuple(like.shape):
        tensor = torch.empty_like(like, dtype=rows.dtype)
    elif isinstance(like, DTensor) and len(rows.shape) == like.ndim and rows.shape[0] == like.shape[0]:
        local = like.to_local()
        shape = torch.Size(rows.shape)
        tensor = DTensor.from_local(
            local.new_empty((len(local), *shape[1:]), dtype=rows.dtype),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
    else:
        return rows.read(slice(None)).view(rows.shape).to(like.device)
    assert isinstance(tensor, DTensor) == isinstance(like, DTensor)
    assign(tensor, rows)
    return tensor


def _compare(named: Mapping[str, Tensor], stored: Mapping[str, StoredRows], source: object) -> None:
    """Refuse tensors that are missing, left over, or of another shape or dtype."""
    missing = [f"{name} {tuple(tensor.shape)} is absent" for name, tensor in named.items() if name not in stored]
    left_over = [f"{name} {rows.shape} has no place in the model" for name, rows in stored.items() if name not in named]
    both = [(name, tensor, stored[name]) for name, tensor in named.items() if name in stored]
    misshaped = [
        f"{name} is {rows.shape}, the model's {tuple(tensor.shape)}"
        for name, tensor, rows in both
        if rows.shape != tuple(tensor.shape)
    ]
    if problems := [*misshaped, *missing, *left_over]:
        raise CheckpointError(
            source,
            f"holds another architecture: {problems[0].removeprefix(_MODEL)}; of the model's {len(named)} tensors "
            f"{len(misshaped)} differ in shape, {len(missing)} are absent; {len(left_over)} are left over",
            "the model options that the checkpoint was trained with",
        )
    for name, tensor, rows in both:
        if rows.dtype != tensor.dtype:
            raise CheckpointError(
                source,
                f"keeps {name.removeprefix(_MODEL)} in {rows.dtype}, the configuration asks for {tensor.dtype}; "
                "weights are not converted on the way",
                "the precision that the checkpoint was trained in",
            )


def _seek(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> None:
    """Put a fresh schedule where it is after ``steps`` steps, with the learning rates that follow from it."""
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    scheduler.last_epoch = steps
    scheduler._last_lr = [
        base * factor(steps) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = lr


def _class_name(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
