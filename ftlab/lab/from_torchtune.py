"""What a configuration of torchtune 0.6.1's full fine-tuning recipes is here: the command, and what it does not carry.

The parts that need a table of their own are in `torchtune_parts` (model, optimizer) and `torchtune_data`.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ftlab.config.check import first_phase
from ftlab.config.compose import compose
from ftlab.config.torchtune_file import read_torchtune_file
from ftlab.errors import ConfigError
from ftlab.lab.torchtune_data import data
from ftlab.lab.torchtune_parts import Kind, Note, Translation, model_and_tokenizer, optimizer, schedule, weights
from ftlab.outputs.secrets import mask_secrets

RECIPES = ("full_finetune_single_device", "full_finetune_distributed")
_TITLES: dict[Kind, str] = {
    "absent": "Without an equivalent",
    "differs": "Not quite the same",
    "fixed": "Right here, wrong in torchtune 0.6.1",
}


def from_torchtune(
    path: Path, overrides: Sequence[str], *, recipe: str | None = None, nproc_per_node: int | None = None
) -> Translation:
    """Translate the configuration in ``path``.

    Args:
        overrides: as for ``tune run``.
        recipe: which of `RECIPES` it was for; None: what the file's keys and comments say.
        nproc_per_node: as for ``tune run``; None: all GPUs of the machine.

    Raises:
        ConfigError: there is no such file, or it is for another kind of recipe.
    """
    tree, named = read_torchtune_file(path, overrides)
    _refuse_other_recipes(tree, named)
    distributed = _is_distributed(tree, recipe or named, nproc_per_node)
    done = Translation(RECIPES[distributed], tree)
    for translate in (model_and_tokenizer, weights, data, optimizer, schedule, _loss, _portions, _precision):
        translate(done)
    _memory(done)
    if distributed:
        _shards(done, nproc_per_node)
    _folder_and_logs(done)
    for key, value in done.left.items():
        done.note("absent", f"{key}={value}", "the recipe does not read it, or ftlab does not know it")
    done.config, problems = first_phase(compose(done.overrides))
    for problem in problems:
        if "no such file or folder" not in problem.problem:  # it will be there where the run is
            done.note("absent", problem.key, f"{problem.problem}; change it before the run")
    return done


def as_script(done: Translation, source: Path) -> str:
    """The translation as a shell script: the command, with everything else in comments."""
    lines = [f"# {source}, for torchtune's {done.recipe}:", ""]
    quoted = [shlex.quote(override) for override in done.overrides]
    lines.append(" \\\n    ".join(["python train.py", *quoted]))
    for kind, title in _TITLES.items():
        notes = [note for note in done.notes if note.kind == kind]
        if notes:
            lines += ["", f"# {title}:", *(line for note in notes for line in _wrapped(note))]
    return "\n".join(lines)


def _wrapped(note: Note) -> list[str]:
    return textwrap.wrap(f"{note.key}: {note.why}", 110, initial_indent="#   ", subsequent_indent="#     ")


def _refuse_other_recipes(tree: dict[str, Any], named: str | None) -> None:
    """Everything that is not full fine-tuning of a language model on one set of weights."""
    model, loss = _component(tree, "model"), _component(tree, "loss")
    builder = model.rpartition(".")[2]
    if "teacher_model" in tree:
        _refuse("teacher_model", "knowledge distillation trains on another model's output")
    if any(key in tree for key in ("ppo_epochs", "policy_model", "reward_and_value_model")):
        _refuse("ppo_epochs", "PPO learns from rewards")
    if "rlhf" in loss or "ref_checkpointer" in tree:
        _refuse("loss", "DPO learns from preferences")
    if tree.get("quantizer") is not None:
        _refuse("quantizer", "quantisation-aware training imitates integers")
    if builder.startswith(("lora_", "qlora_", "dora_", "qdora_")) or "lora_attn_modules" in str(tree):
        _refuse("model", f"{builder} trains low-rank adapters")
    if "vision" in model or "flamingo" in model:
        _refuse("model", f"{builder} reads images")
    if named is not None and named not in RECIPES:
        _refuse("recipe", f"{named} is another recipe")
    if "optimizer" not in tree or "dataset" not in tree:
        _refuse("optimizer", "without one nothing is trained")
    if not model:
        _refuse("model._component_", "the file does not say which model is trained")


def _refuse(key: str, what: str) -> NoReturn:
    problem = f"{what}; ftlab takes the full fine-tuning recipes of language models ({', '.join(RECIPES)})"
    raise ConfigError(key, problem, "tune ls: any configuration named ..._full or ..._full_single_device")


def _component(tree: dict[str, Any], key: str) -> str:
    node = tree.get(key)
    return str(node.get("_component_", "")) if isinstance(node, dict) else ""


_OF_SEVERAL = (
    "custom_sharded_layers",
    "fsdp_",
    "tensor_parallel_",
    "ac_mode",
    "ac_option",
    "enable_async_checkpointing",
)


def _is_distributed(tree: dict[str, Any], recipe: str | None, nproc_per_node: int | None) -> bool:
    if recipe is not None:
        return recipe == RECIPES[1]
    return nproc_per_node is not None or any(key.startswith(_OF_SEVERAL) for key in tree)


def _loss(done: Translation) -> None:
    component = done.component("loss")
    options = {
        "CrossEntropyLoss": "cross_entropy",
        "CEWithChunkedOutputLoss": "chunked_cross_entropy",
        "LinearCrossEntropyLoss": "chunked_cross_entropy",
    }
    option = options.get(component.rpartition(".")[2])
    if option is None:
        raise ConfigError("loss._component_", f"{component} is not cross-entropy", "loss=torch.nn.CrossEntropyLoss")
    done.choose("loss", option)
    done.take("loss.num_output_chunks")
    if smoothing := done.take("loss.label_smoothing"):
        done.set("loss.label_smoothing", smoothing)


def _portions(done: Translation) -> None:
    """Epochs, steps, batches, seed."""
    done.set("seed", done.take("seed"))
    for ours, theirs in (
        ("trainer.epochs", "epochs"),
        ("trainer.batch_size", "batch_size"),
        ("trainer.gradient_accumulation_steps", "gradient_accumulation_steps"),
    ):
        done.set(ours, done.take(theirs, 1))
    if (steps := done.take("max_steps_per_epoch")) is not None:
        done.set("trainer.max_steps_per_epoch", steps)
    done.set("trainer.max_grad_norm", done.take("clip_grad_norm"))
    if (steps := done.take("log_every_n_steps", 1)) not in (1, None):
        done.set("trainer.log_every_steps", steps)
    done.take("log_peak_memory_stats")  # memory/peak_gib is always logged
    if done.take("cudnn_deterministic_mode") is not None:
        done.note("absent", "cudnn_deterministic_mode", "language models use no cuDNN kernels")
    done.note("fixed", "seed", "the data order follows from it; torchtune's sampler is always seeded with 0")
    done.note(
        "fixed",
        "batch_size",
        "an epoch sees every row; torchtune drops the rows that fill no batch, and carries the gradients of an "
        "unfinished accumulation into the next epoch's first step",
    )


def _precision(done: Translation) -> None:
    dtype = done.take("dtype", "fp32")
    if dtype not in ("bf16", "fp32", "fp16"):
        raise ConfigError("dtype", f"{dtype} is not bf16 or fp32", "dtype=bf16")
    done.choose("precision", "fp16_mixed" if dtype == "fp16" else dtype)
    if dtype == "bf16":
        done.note(
            "differs",
            "dtype=bf16",
            "the same, and small updates are lost in bfloat16 weights; precision=bf16_mixed keeps them in float32",
        )
    elif dtype == "fp16":
        done.note("fixed", "dtype=fp16", "float32 weights and loss scaling; torchtune refuses fp16")
    if (device := done.take("device", "cuda")) == "cpu":
        done.set("device", "cpu")
    elif device != "cuda":
        done.note("absent", f"device={device}", "ftlab runs on CUDA and CPU")


def _memory(done: Translation) -> None:
    """What trades memory for time, and compilation."""
    _activations(done)
    if done.take("compile"):
        done.set("compile", True)
    if done.take("optimizer_in_bwd"):
        done.set("trainer.optimizer_in_backward", True)
        if done.recipe == RECIPES[0]:
            done.note(
                "fixed",
                "optimizer_in_bwd",
                "the gradient is that of the mean loss; the single-device recipe steps with that of the sum",
            )


def _activations(done: Translation) -> None:
    checkpointing, offloading = done.take("enable_activation_checkpointing"), done.take("enable_activation_offloading")
    mode, option = done.take("ac_mode"), done.take("ac_option")
    if mode == "selective":
        done.set("parallelism.activation_checkpointing", "selective")
        if option != "op":
            why = "torchtune recomputes every so many layers; selective here keeps attention and every second matmul"
            done.note("differs", f"ac_option={option}", why)
        if offloading:
            done.note("absent", "enable_activation_offloading", "not with selective; only memory differs")
    elif offloading:  # which torchtune has with checkpointing only
        done.set("parallelism.activation_checkpointing", "offload")
    elif checkpointing or mode == "full":
        done.set("parallelism.activation_checkpointing", "full")


def _shards(done: Translation, nproc_per_node: int | None) -> None:
    done.choose("parallelism", "fsdp", first=True)
    if nproc_per_node is not None:
        done.set("parallelism.nproc_per_node", nproc_per_node)
    if done.take("fsdp_cpu_offload"):
        done.set("parallelism.cpu_offload", True)
    if done.take("fsdp_reshard_after_forward", True) is False:
        done.set("parallelism.reshard_after_forward", False)
    if done.take("enable_async_checkpointing"):
        done.set("checkpoint.async", True)
    done.take("custom_sharded_layers")  # embedding and head are always sharded
    degree = done.take("tensor_parallel_dim", 1)
    done.take_all("tensor_parallel_plan")
    if degree != 1:
        done.note("absent", f"tensor_parallel_dim={degree}", "weights are sharded over all ranks, none is split in use")


def _folder_and_logs(done: Translation) -> None:
    if (folder := done.take("output_dir")) is not None:
        done.set("paths.output_dir", folder)
    _logger(done, folder)
    profiler = done.take_all("profiler")
    if profiler.get("enabled"):
        warm = profiler.get("wait_steps", 5) + profiler.get("warmup_steps", 3)
        done.set("trainer.profile_steps", [warm + 1, warm + profiler.get("active_steps", 2)])
    done.take("collate_fn")


_OF_WANDB = {
    "name": "run_name",
    **{name: f"logger.wandb.{name}" for name in ("project", "entity", "group", "job_type", "tags")},
}


def _logger(done: Translation, folder: str | None) -> None:
    logger = done.component("metric_logger", "").rpartition(".")[2]
    settings = {name: value for name, value in done.take_all("metric_logger").items() if value is not None}
    if f"{settings.get('log_dir', folder)}/".startswith(f"{folder}/"):
        settings.pop("log_dir", None)  # the run's folder holds its logs anyway
    if logger == "WandBLogger":
        for name in [name for name in _OF_WANDB if name in settings]:
            done.set(_OF_WANDB[name], settings.pop(name))
    else:
        done.overrides.append("logger=[console,jsonl]")
        if logger not in ("DiskLogger", "StdoutLogger", ""):
            why = "metrics go to metrics.jsonl; logger=[console,jsonl,wandb] adds W&B"
            done.note("absent", f"metric_logger={logger}", why)
    for name, value in settings.items():
        done.note("absent", mask_secrets(f"metric_logger.{name}={value}"), "logs go into the run's folder")
