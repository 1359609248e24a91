"""Values that are each in order and cannot be together. No torch, no files: arithmetic on the plain configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ftlab.errors import ConfigError
from ftlab.typed import as_typed, override

Values = Mapping[str, Any]
_PROCESSES, _NODES = "parallelism.nproc_per_node", "parallelism.nnodes"


def contradictions(values: Values) -> Iterator[ConfigError]:
    """Check ``values`` (dotted key to value). Keys that are missing, or broken already, take part in no rule."""
    rules = (
        _length,
        _portions,
        _warmup,
        _sequence,
        _packing,
        _mixture,
        _streaming,
        _heads,
        _mesh,
        _in_backward,
        _optimizers,
        _precision,
        _judgement,
        _profile,
    )
    for rule in rules:
        yield from rule(values)


def _has(values: Values, *keys: str) -> bool:
    """Whether all of ``keys`` are there, null or not."""
    return all(key in values for key in keys)


def _are_set(values: Values, *keys: str) -> bool:
    return all(values.get(key) is not None for key in keys)


def _length(values: Values) -> Iterator[ConfigError]:
    epochs, max_steps = "trainer.epochs", "trainer.max_steps"
    if not _has(values, epochs, max_steps) or (values[epochs] is None) != (values[max_steps] is None):
        return
    state = "neither is" if values[epochs] is None else f"both are: {values[epochs]} and {values[max_steps]}"
    fix = override(epochs, 3) if values[epochs] is None else override(epochs, None)
    yield ConfigError(epochs, f"set exactly one of {epochs} and {max_steps}, {state}", fix)


def _portions(values: Values) -> Iterator[ConfigError]:
    batch, accumulation, whole = (
        f"trainer.{name}" for name in ("batch_size", "gradient_accumulation_steps", "global_batch_size")
    )
    if not _has(values, batch, accumulation, whole):
        return
    if values[batch] == "auto":
        if values[whole] is None:
            problem = f"auto, but without {whole} the samples of a step would depend on the memory there is"
            yield ConfigError(batch, problem, override(whole, 32))
        return
    if (values[accumulation] is None) == (values[whole] is None):
        state = "neither is" if values[whole] is None else f"both are: {values[accumulation]} and {values[whole]}"
        fix = override(accumulation, 1) if values[whole] is None else override(accumulation, None)
        yield ConfigError(whole, f"set exactly one of {accumulation} and {whole}, {state}", fix)
    elif values[whole] is not None and values[batch] is not None:
        # Where it is known later how many ranks there are, a multiple for one is needed whatever their number.
        ranks = _known_ranks(values) or 1
        at_once = values[batch] * ranks
        if values[whole] % at_once:
            problem = f"{values[whole]} is not a multiple of {batch} × data-parallel ranks = {values[batch]} × {ranks}"
            yield ConfigError(whole, problem, override(whole, max(1, round(values[whole] / at_once)) * at_once))


def _warmup(values: Values) -> Iterator[ConfigError]:
    steps, ratio, max_steps = "scheduler.warmup_steps", "scheduler.warmup_ratio", "trainer.max_steps"
    if _are_set(values, steps, ratio):
        state = f"both are: {values[steps]} and {values[ratio]}"
        yield ConfigError(steps, f"set at most one of {steps} and {ratio}, {state}", override(ratio, None))
    if _are_set(values, steps, max_steps) and values[steps] > values[max_steps]:
        problem = f"{values[steps]} is more than {max_steps} = {values[max_steps]}: the warmup would never end"
        yield ConfigError(steps, problem, override(steps, values[max_steps] // 10))
    decay = "scheduler.decay_ratio"
    if _are_set(values, decay, ratio) and values[decay] + values[ratio] > 1:
        problem = f"{values[decay]} of the steps decay, but {values[ratio]} warm up: more than there are"
        yield ConfigError(decay, problem, override(decay, round(1 - values[ratio], 6)))


def _sequence(values: Values) -> Iterator[ConfigError]:
    length, limit = "seq_len", "model.max_seq_len"
    if _are_set(values, length, limit) and values[length] > values[limit]:
        problem = f"{values[length]} is more than the model's {limit} = {values[limit]}"
        yield ConfigError(length, problem, override(length, values[limit]))


def _packing(values: Values) -> Iterator[ConfigError]:
    if values.get("model._target_") != "ftlab.models.hf.HFModel":
        return
    for key, value in values.items():
        if key.startswith("dataset.") and key.endswith("packing") and value not in (None, "none"):
            yield ConfigError(key, f"{value}, but model=hf cannot keep packed documents apart", override(key, "none"))
    shared = "trainer.share_prefixes"
    if values.get(shared) is True:
        yield ConfigError(shared, "true, but model=hf computes every row whole", override(shared, False))


def _mixture(values: Values) -> Iterator[ConfigError]:
    sets = dict.fromkeys(key.split(".")[2] for key in values if key.startswith("dataset.sets."))
    weights = {key.split(".")[2]: value for key, value in values.items() if key.startswith("dataset.weights.")}
    for name in dict.fromkeys([*sets, *weights] if sets else []):
        key, weight = f"dataset.weights.{name}", weights.get(name)
        if name not in sets or name not in weights:
            has, lacks = ("a weight", "no set") if name in weights else ("a set", "no weight")
            sign, value = ("~", "") if name in weights else ("+", "=1")
            problem = f"{name} is {has} of the mixture, with {lacks} of that name"
            yield ConfigError(key, problem, f"{sign}{key}{value}")
        elif isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            yield ConfigError(key, f"{weight!r} is not a number above 0", override(key, 1.0))


def _streaming(values: Values) -> Iterator[ConfigError]:
    for key, value in values.items():
        if key.startswith("dataset.sets.") and key.endswith(".streaming") and value is True:
            yield ConfigError(key, "true, but a mixture has to know how many rows each set has", override(key, False))
    max_steps = "trainer.max_steps"
    if values.get("dataset.streaming") is True and max_steps in values and values[max_steps] is None:
        problem = "is null, but with dataset.streaming=true nobody knows beforehand how many steps an epoch has"
        yield ConfigError(max_steps, problem, f"{override(max_steps, 1000)} trainer.epochs=null")


def _heads(values: Values) -> Iterator[ConfigError]:
    dim, heads, kv_heads, head_dim = (f"model.{name}" for name in ("dim", "n_heads", "n_kv_heads", "head_dim"))
    if _are_set(values, heads, kv_heads) and values[heads] % values[kv_heads]:
        problem = f"{values[heads]} is not a multiple of {kv_heads} = {values[kv_heads]}"
        yield ConfigError(heads, problem, override(kv_heads, values[heads]))
    if not _are_set(values, dim, heads) or head_dim not in values:
        return
    if values[head_dim] is None and values[dim] % values[heads]:
        problem = f"{values[dim]} is not a multiple of {heads} = {values[heads]}, and {head_dim} is null"
        yield ConfigError(dim, problem, override(dim, -(-values[dim] // values[heads]) * values[heads]))
    elif (size := values[head_dim] or values[dim] // values[heads]) % 2:
        problem = f"{size} is odd: rotary embeddings turn pairs of dimensions"
        yield ConfigError(head_dim, problem, override(head_dim, size + 1))


def _mesh(values: Values) -> Iterator[ConfigError]:
    replicate, shard = "parallelism.replicate_degree", "parallelism.shard_degree"
    ranks = _known_ranks(values)
    if ranks is None or not _are_set(values, replicate, shard):
        return  # ftlab/distributed/fsdp.py checks when it is known how many there are
    made = values[replicate] * values[shard]
    if made != ranks:
        problem = (
            f"replicate_degree × shard_degree = {values[replicate]} × {values[shard]} = {made}, but "
            f"nproc_per_node × nnodes = {values[_PROCESSES]} × {values[_NODES]} = {ranks} ranks"
        )
        yield ConfigError(replicate, problem, override(replicate, None))


def _known_ranks(values: Values) -> int | None:
    """How many ranks the configuration itself starts; None where that depends on the machine or on a launcher."""
    return values[_PROCESSES] * values[_NODES] if _are_set(values, _PROCESSES, _NODES) else None


def _in_backward(values: Values) -> Iterator[ConfigError]:
    """What needs the gradients of a step together cannot be had when each is used and freed as it comes."""
    key = "trainer.optimizer_in_backward"
    if not values.get(key):
        return
    needed = {
        "trainer.max_grad_norm": ("clips by the norm of all gradients, which is known after the backward", None),
        "trainer.gradient_accumulation_steps": ("adds gradients up over micro-batches", 1),
        "trainer.max_skipped_steps": ("leaves steps out whose gradients are bad, known after the backward", 0),
        "trainer.spike_sigma": ("leaves steps out after looking at their loss", None),
        "precision.loss_scaling": ("looks at all gradients before the update", False),
        "parallelism.cpu_offload": ("keeps gradients on the host, where they take nothing from the GPU", False),
    }
    for other, (does, harmless) in needed.items():
        if other in values and values[other] not in (None, harmless):
            fix = "precision=bf16_mixed" if other == "precision.loss_scaling" else override(other, harmless)
            yield ConfigError(key, f"true, but {other}={as_typed(values[other])} {does}", fix)
    if values.get("parallelism._target_") == "ftlab.distributed.ddp.DDP":
        yield ConfigError(key, "true, but parallelism=ddp exchanges gradients after they are made", "parallelism=fsdp")


def _optimizers(values: Values) -> Iterator[ConfigError]:
    key = "optimizer.moment_bits"
    if values.get(key) not in (None, 8, 16):
        yield ConfigError(key, f"must be 8 or 16, got {values[key]}", override(key, 8))
    target = str(values.get("optimizer._target_"))
    strategy = str(values.get("parallelism._target_"))
    if target == "torch.optim.Adafactor" and strategy.startswith("ftlab.distributed.fsdp."):
        problem = "adafactor averages over whole matrices, and torch's knows nothing of shards"
        yield ConfigError("optimizer", problem, "optimizer=adamw_8bit, or parallelism=ddp")
    schedule = str(values.get("scheduler._target_"))
    if target.endswith(".ScheduleFreeAdamW") and schedule not in ("None", "ftlab.optim.schedules.Constant"):
        problem = f"schedule_free averages instead of decaying, but {schedule.rpartition('.')[2]} decays"
        yield ConfigError("scheduler", problem, "scheduler=constant")
    if values.get("trainer.optimizer_in_backward") and target.rpartition(".")[2] in ("Muon", "ScheduleFreeAdamW"):
        problem = f"true, but {target.rpartition('.')[2]} does not update each weight by itself"
        yield ConfigError("trainer.optimizer_in_backward", problem, "optimizer=adamw")

    momentum, nesterov = "optimizer.momentum", "optimizer.nesterov"
    if values.get(nesterov) is True and values.get(momentum) == 0:
        yield ConfigError(nesterov, f"true, but {momentum}=0: there is nothing to look ahead along", f"{momentum}=0.9")


def _precision(values: Values) -> Iterator[ConfigError]:
    weights, compute, scaling = (f"precision.{name}" for name in ("param_dtype", "compute_dtype", "loss_scaling"))
    if values.get(compute) == "float32" and values.get(weights) in ("bfloat16", "float16"):
        problem = f"float32, but weights in {values[weights]} are multiplied as they are"
        yield ConfigError(compute, problem, override(weights, "float32"))
    if values.get(scaling) is True and values.get(weights) == "float16":
        problem = "float16, but gradients in float16 cannot be unscaled without losing what scaling saved"
        yield ConfigError(weights, problem, override(weights, "float32"))
    if values.get(scaling) is True and values.get("parallelism.cpu_offload") is True:
        problem = "true, but the scale of the loss is on the GPU, and the gradients are not"
        yield ConfigError(scaling, problem, "precision=bf16_mixed")


def _judgement(values: Values) -> Iterator[ConfigError]:
    metric, n_samples = "evaluation.metric", "evaluation.n_samples"
    if _are_set(values, metric) and values[metric].startswith("val/exact_match") and values.get(n_samples) == 0:
        yield ConfigError(metric, f"{values[metric]}, but {n_samples}=0: nothing is answered", override(n_samples, 8))


def _profile(values: Values) -> Iterator[ConfigError]:
    key = "trainer.profile_steps"
    if not _are_set(values, key) or len(values[key]) != 2:
        return
    first, last = values[key]
    if first > last:
        yield ConfigError(key, f"{first} comes after {last}", override(key, [last, first]))
    elif _are_set(values, "trainer.max_steps") and last > values["trainer.max_steps"]:
        n = values["trainer.max_steps"]
        yield ConfigError(key, f"the run ends with step {n}", override(key, [min(first, n), n]))
