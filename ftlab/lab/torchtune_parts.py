"""A torchtune configuration being translated, and its parts model, weights, optimizer and schedule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from ftlab.config.compose import CONF
from ftlab.config.layers import leaves
from ftlab.errors import ConfigError
from ftlab.typed import argument

Kind = Literal["absent", "differs", "fixed"]


@dataclass(frozen=True)
class Note:
    """What the command does not say: ``absent`` here, ``differs``, or ``fixed``: wrong there and right here."""

    kind: Kind
    key: str
    why: str


class Translation:
    """A command in the making.

    Args:
        recipe: which of torchtune's it was for.
        tree: its configuration, resolved.

    Attributes:
        overrides: of ``python train.py``.
        left: dotted key and value of what nobody has taken yet.
        config: what the finished command composes to.
    """

    def __init__(self, recipe: str, tree: dict[str, Any]):
        self.recipe = recipe
        self.overrides: list[str] = []
        self.notes: list[Note] = []
        self.tree = tree
        self.config: dict[str, Any] = {}
        self.left: dict[str, Any] = dict(leaves(tree))

    def take(self, key: str, default: Any = None) -> Any:
        """The value of ``key``, which is thereby dealt with."""
        return self.left.pop(key, default)

    def take_all(self, prefix: str) -> dict[str, Any]:
        """Everything below ``prefix``, by the rest of its key."""
        self.left.pop(prefix, None)  # where it is null, or empty
        below = [key for key in self.left if key.startswith(f"{prefix}.")]
        return {key.removeprefix(f"{prefix}."): self.left.pop(key) for key in below}

    def component(self, key: str, default: str | None = None) -> str:
        """The dotted path of a component."""
        found = self.take(f"{key}._component_", default)
        if found is None:
            raise ConfigError(f"{key}._component_", "is missing, so it is not known what this is", f"{key}=dotted.path")
        return str(found)

    def choose(self, group: str, *options: str, first: bool = False) -> None:
        """Choose the first of ``options`` that there is."""
        option = next(name for name in options if has_option(group, name))
        self.overrides.insert(0 if first else len(self.overrides), f"{group}={option}")

    def set(self, key: str, value: Any) -> None:
        self.overrides.append(argument(key, value))

    def note(self, kind: Kind, key: str, why: str) -> None:
        self.notes.append(Note(kind, key, why))


def has_option(group: str, name: str) -> bool:
    """Whether ``conf/`` has it."""
    return (CONF / group / f"{name}.yaml").is_file()


# ---- model, tokenizer, weights

_OTHER_NAMES = {"mistral_7b": "mistral_7b_v0_1"}
_READ_FROM_FOLDER = (
    "llama2",
    "llama3",
    "llama3_1",
    "llama3_2",
    "llama3_3",
    "mistral",
    "code_llama2",
    "qwen2",
    "qwen2_5",
)


def model_and_tokenizer(done: Translation) -> None:
    component = done.component("model")
    family, _, builder = component.removeprefix("torchtune.models.").rpartition(".")
    for key, value in done.take_all("model").items():
        done.note("absent", f"model.{key}={value}", "the option or the checkpoint says it; model.* changes it")
    name = builder.removesuffix("_base").removesuffix("_instruct")
    name = _OTHER_NAMES.get(name, name)
    if has_option("model", name):
        done.choose("model", name)
    else:
        done.choose("model", "auto" if family in _READ_FROM_FOLDER else "hf")
        done.note("differs", f"model={builder}", "its sizes are read from the config.json beside the weights")
    if family == "mistral":
        why = "tokens attend to the 4,096 before them, as the model was trained; torchtune lets them see all"
        done.note("fixed", "model", why)


def weights(done: Translation) -> None:
    """The checkpoint and the tokenizer's file."""
    component = done.component("checkpointer").rpartition(".")[2]
    if component not in ("FullModelHFCheckpointer", "FullModelMetaCheckpointer"):
        problem = f"{component} reads a format of torchtune's own; ftlab reads Hugging Face's and Meta's"
        raise ConfigError("checkpointer", problem, "checkpointer=torchtune.training.FullModelHFCheckpointer")
    settings = done.take_all("checkpointer")
    folder = str(settings.get("checkpoint_dir", "")).rstrip("/")
    if not folder:
        raise ConfigError("checkpointer.checkpoint_dir", "is missing", "checkpointer.checkpoint_dir=/path/to/weights")
    done.set("model.checkpoint", _local(folder))
    files = settings.get("checkpoint_files")
    if isinstance(files, list) and any(str(file).endswith((".bin", ".pt")) for file in files):
        why = "the folder's safetensors are read: .bin files are pickles, which can run code"
        done.note("differs", "checkpointer.checkpoint_files", why)
    if done.take("resume_from_checkpoint", False):
        why = "a torchtune run cannot be gone on with; the new run begins with the weights in checkpoint_dir"
        done.note("absent", "resume_from_checkpoint", why)
    names = ("path", "merges_file", "special_tokens_path", "vocab_path", "merges_path")
    paths = [path for name in names if (path := done.take(f"tokenizer.{name}")) is not None]
    if paths:
        path = paths[0]
        beside = PurePosixPath(path).parent
        if beside not in (PurePosixPath(folder), PurePosixPath(folder) / "original"):
            # Of a vocabulary and its merges, the folder holds tokenizer.json too.
            done.set("tokenizer.path", _local(str(beside if PurePosixPath(path).suffix == ".json" else path)))


def _local(path: str) -> str:
    """A path that is not taken for a name on the Hub."""
    return path if path.startswith(("/", "~", ".")) else f"./{path}"


# ---- optimizer and schedule


@dataclass(frozen=True)
class _Optimizer:
    """``options``: ours, the first that is there; ``defaults``: torchtune's own where its file says nothing."""

    options: tuple[str, ...]
    defaults: dict[str, Any]
    why: str = ""


_ADAMW = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
_PAGED = "its moments stay on the GPU; the numbers are the same"
_EIGHT_BIT = "bfloat16 weights are rounded stochastically, so that small updates count on average"
_OPTIMIZERS = {
    "torch.optim.AdamW": _Optimizer(("adamw",), _ADAMW),
    "torch.optim.SGD": _Optimizer(("sgd",), {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}),
    "bitsandbytes.optim.AdamW": _Optimizer(("adamw",), _ADAMW),
    "bitsandbytes.optim.PagedAdamW": _Optimizer(("adamw",), _ADAMW, _PAGED),
    "bitsandbytes.optim.PagedAdamW8bit": _Optimizer(("adamw_8bit",), _ADAMW, _EIGHT_BIT),
    "bitsandbytes.optim.AdamW8bit": _Optimizer(("adamw_8bit",), _ADAMW, _EIGHT_BIT),
    "torchao.prototype.low_bit_optim.AdamW8bit": _Optimizer(("adamw_8bit",), _ADAMW, _EIGHT_BIT),
    "torchao.optim.AdamW8bit": _Optimizer(("adamw_8bit",), _ADAMW, _EIGHT_BIT),
}


def optimizer(done: Translation) -> None:
    component = done.component("optimizer")
    if component not in _OPTIMIZERS:
        problem = f"{component} has no equivalent; there are {', '.join(_OPTIMIZERS)}"
        raise ConfigError("optimizer._component_", problem, "optimizer=torch.optim.AdamW")
    known = _OPTIMIZERS[component]
    done.choose("optimizer", *known.options)
    settings = done.take_all("optimizer")
    settings.pop("fused", None)  # one kernel a step, wherever there is one
    if (rate := settings.pop("lr", None)) is None:
        raise ConfigError("optimizer.lr", "is missing", "optimizer.lr=2e-5")
    done.set("optimizer.lr", float(rate))  # YAML reads 2e-5 as text
    for key, value in (known.defaults | {k: v for k, v in settings.items() if k in known.defaults}).items():
        done.set(f"optimizer.{key}", float(value) if isinstance(value, str) else value)
    for key, value in settings.items():
        if key not in known.defaults:
            done.note("absent", f"optimizer.{key}={value}", "no such setting here")
    if known.why:
        done.note("differs", f"optimizer={component.rpartition('.')[2]}", known.why)
    if known.defaults["weight_decay"]:
        done.note("differs", "optimizer.weight_decay", "matrices only; torchtune decays norms and biases too")


def schedule(done: Translation) -> None:
    if "lr_scheduler" not in done.tree or done.tree["lr_scheduler"] is None:
        done.take("lr_scheduler")
        done.choose("scheduler", "constant")
        done.set("scheduler.warmup_steps", 0)
        return
    component = done.component("lr_scheduler").rpartition(".")[2]
    settings = done.take_all("lr_scheduler")
    if component != "get_cosine_schedule_with_warmup" or settings.get("num_cycles", 0.5) != 0.5:
        raise ConfigError(
            "lr_scheduler",
            f"{component} with {settings} is not half a cosine, the only one torchtune has",
            "~lr_scheduler",
        )
    done.choose("scheduler", "cosine")
    done.set("scheduler.warmup_steps", settings.get("num_warmup_steps", 0))
    done.set("scheduler.min_lr_ratio", 0.0)
    done.note(
        "fixed", "lr_scheduler", "the first step learns; torchtune's warm-up begins with a step at learning rate 0"
    )
