"""What each key's value may be: a table, and the kinds of rules that it is written in.

A key that is not in the table must be of the type that its option's file gives it, so that a new option
needs no line here. What two values may not be *together* is in `contradictions`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ftlab.errors import ConfigError
from ftlab.typed import as_typed, override


def _bound(value: float) -> str:
    return "2**63" if value == 2**63 else f"{value:g}"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """``optional`` values may be null; ``example`` is what an error offers to type."""

    optional: bool = False
    example: Any = None

    def check(self, key: str, value: Any) -> Iterator[ConfigError]:
        if value is None:
            if not self.optional:
                yield self._error(key, "needs a value, got null")
        elif (problem := self.broken_by(value)) is not None:
            yield self._error(key, problem, self.nearest(value))

    def broken_by(self, value: Any) -> str | None:
        """What is wrong with ``value``, which is not null; None when nothing is."""
        raise NotImplementedError

    def nearest(self, value: Any) -> Any:  # noqa: ARG002
        """A value that is probably meant; None when there is no telling."""
        return None

    def _error(self, key: str, problem: str, suggestion: Any = None) -> ConfigError:
        return ConfigError(key, problem, self._fix(key, suggestion))

    def _fix(self, key: str, suggestion: Any) -> str | None:
        better = suggestion if suggestion is not None else self.example
        return None if better is None else override(key, better)


@dataclass(frozen=True, kw_only=True)
class Number(Rule):
    """A finite number: ``low <= x`` (``low < x`` when ``open_low``), and ``x < below`` or ``x <= at_most``."""

    name: str = "value"
    whole: bool = False
    low: float | None = None
    open_low: bool = False
    below: float | None = None
    at_most: float | None = None

    def broken_by(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return f"must be a {'whole ' if self.whole else ''}number, got {value!r}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be finite, got {value}"
        if not self._inside(value):
            return f"must be {self._range()}, got {value}"
        return "must be less than 2**63 in size" if isinstance(value, int) and abs(value) >= 2**63 else None

    def nearest(self, value: Any) -> Any:
        if isinstance(value, float) and self.whole and value.is_integer() and self._inside(value):
            return int(value)
        if self.example is None and not self.open_low:
            return self.at_most if isinstance(value, (int, float)) and value > (self.low or 0) else self.low
        return self.example

    def _inside(self, value: float) -> bool:
        return (
            (self.low is None or (value > self.low if self.open_low else value >= self.low))
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def _range(self) -> str:
        low = "" if self.low is None else _bound(self.low)
        if self.below is None and self.at_most is None:
            return f"{'>' if self.open_low else '>='} {low}"
        high = f"< {_bound(self.below)}" if self.below is not None else f"<= {_bound(self.at_most or 0)}"
        return f"in {low} {'<' if self.open_low else '<='} {self.name} {high}" if low else high


@dataclass(frozen=True, kw_only=True)
class Flag(Rule):
    """true or false."""

    def broken_by(self, value: Any) -> str | None:
        return None if isinstance(value, bool) else f"must be true or false, got {value!r}"

    def nearest(self, value: Any) -> Any:
        return {"y": True, "1": True, "t": True, "n": False, "0": False, "f": False}.get(str(value)[:1].lower())


@dataclass(frozen=True, kw_only=True)
class Text(Rule):
    """Text, not empty."""

    def broken_by(self, value: Any) -> str | None:
        if not isinstance(value, str):
            return f"must be text, got {value!r}"
        return None if value.strip() else "must not be empty"

    def nearest(self, value: Any) -> Any:
        return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class OneOf(Rule):
    """One of a few words, or one that begins with ``prefix``."""

    choices: tuple[str, ...]
    prefix: str | None = None

    def broken_by(self, value: Any) -> str | None:
        if value in self.choices or (self.prefix and isinstance(value, str) and value.startswith(self.prefix)):
            return None
        more = f" or {self.prefix}…" if self.prefix else ""
        return f"must be one of {', '.join(self.choices)}{more}, got {value!r}"

    def nearest(self, value: Any) -> Any:
        return difflib.get_close_matches(str(value), self.choices, n=1, cutoff=0.0)[0]


@dataclass(frozen=True)
class ListOf(Rule):
    """A list, each element under ``rule``."""

    rule: Rule
    length: int | None = None

    def check(self, key: str, value: Any) -> Iterator[ConfigError]:
        if value is not None and not isinstance(value, list):
            yield self._error(key, f"must be a list, got {value!r}", self.nearest(value))
        elif value is None or (self.length is not None and len(value) != self.length):
            if value is not None or not self.optional:
                count = f" of {self.length}" if self.length else ""
                yield self._error(key, f"must be a list{count}, got {as_typed(value)}")
        else:
            for i, element in enumerate(value):
                broken = "needs a value" if element is None else self.rule.broken_by(element)
                if broken:  # the whole list: an element of one that replaces null has no key of its own
                    yield ConfigError(f"{key}.{i}", broken, self._fix(key, self.nearest(value)))

    def nearest(self, value: Any) -> Any:
        elements = [self._repaired(element) for element in (value if isinstance(value, list) else [value])]
        return elements if None not in elements and self.length in (None, len(elements)) else None

    def _repaired(self, element: Any) -> Any:
        if element is not None and self.rule.broken_by(element) is None:
            return element
        nearest = None if element is None else self.rule.nearest(element)
        return self.rule.example if nearest is None else nearest


@dataclass(frozen=True)
class AnyOf(Rule):
    """One of several kinds."""

    rules: tuple[Rule, ...]

    def check(self, key: str, value: Any) -> Iterator[ConfigError]:
        if value is None:
            yield from super().check(key, value)
        elif all(problems := [list(rule.check(key, value)) for rule in self.rules]):
            yield problems[0][0]


@dataclass(frozen=True, kw_only=True)
class Part(Rule):
    """What an object is built from: a mapping that names its class."""

    def broken_by(self, value: Any) -> str | None:
        named = isinstance(value, Mapping) and isinstance(value.get("_target_"), str)
        return None if named else f"must hold a _target_ with its arguments, or be null, got {value!r}"


COUNT = Number(whole=True, low=1)
OPTIONAL_COUNT = Number(whole=True, low=1, optional=True)
SHARE = Number(name="share", low=0, below=1)  # of something; all of it would leave nothing
DTYPE = OneOf(("float32", "bfloat16", "float16"))
_EPS = Number(low=0, open_low=True, example=1e-8)
_FIELDS = ("instruction", "input", "output", "messages", "system", "tools", "family")
FILES = AnyOf((Text(), ListOf(Text())), optional=True)

RULES: dict[str, Rule] = {
    "run_name": Text(),
    "seed": Number(name="seed", whole=True, low=0, below=2**63, optional=True),
    "seq_len": COUNT,
    "resume": Text(optional=True),
    "init_from": Text(optional=True),
    "device": OneOf(("auto", "cpu", "cuda")),
    "sweep.jobs_at_once": COUNT,
    "sweep.resume": Text(optional=True),
    "sweep.trial": Number(whole=True, low=0, optional=True),
    "paths.output_dir": Text(optional=True),
    "paths.cache_dir": Text(optional=True),
    "model.checkpoint": Text(optional=True),
    "model.dim": COUNT,
    "model.n_layers": COUNT,
    "model.n_heads": COUNT,
    "model.n_kv_heads": OPTIONAL_COUNT,
    "model.head_dim": OPTIONAL_COUNT,
    "model.ffn_hidden_dim": COUNT,
    "model.vocab_size": OPTIONAL_COUNT,
    "model.max_seq_len": COUNT,
    "model.sliding_window": OPTIONAL_COUNT,
    "model.norm_eps": Number(low=0, open_low=True, example=1e-5),
    "model.rope_scaling": Part(optional=True),
    "model.rope_theta": Number(low=0, open_low=True, example=10000.0),
    "tokenizer.path": Text(example="/path/to/tokenizer.model"),
    "tokenizer.added_tokens": ListOf(Text()),
    "tokenizer.added_special_tokens": ListOf(Text()),
    "dataset.data_files": FILES,
    "dataset.source": Text(),
    **{f"dataset.column_map.{field}": Text(optional=True) for field in _FIELDS},
    "dataset.template.path": Text(optional=True),
    "dataset.val_fraction": Number(name="share", low=0, below=1, optional=True, example=0.05),
    "dataset.max_samples": OPTIONAL_COUNT,
    "dataset.epoch_rows": OPTIONAL_COUNT,
    "dataset.too_long": OneOf(("truncate", "truncate_keep_eos", "truncate_left", "split", "drop", "error")),
    "dataset.window_rows": COUNT,
    "dataset.packing": OneOf(("none", "greedy", "best_fit")),
    "dataset.subset": Text(optional=True),
    "dataset.revision": Text(optional=True),
    "dataset.val_split": Text(optional=True),
    "dataset.val_data_files": FILES,
    "dataset.filter": Text(optional=True, example="len(output) > 10"),
    "dataset.allow": ListOf(Text()),
    "loss.label_smoothing": SHARE,
    "loss.z_loss": Number(low=0),
    "loss.chunk_tokens": COUNT,
    "optimizer.lr": Number(low=0, open_low=True, example=2e-5),
    "optimizer.betas": ListOf(Number(name="beta", low=0, below=1, example=0.9), length=2, example=[0.9, 0.95]),
    "optimizer.eps": AnyOf((_EPS, ListOf(_EPS, length=2))),
    "optimizer.weight_decay": Number(low=0),
    "optimizer.momentum": SHARE,
    "scheduler.warmup_steps": Number(whole=True, low=0, optional=True),
    "scheduler.warmup_ratio": Number(name="ratio", low=0, at_most=1, optional=True),
    "scheduler.min_lr_ratio": Number(name="ratio", low=0, at_most=1),
    "scheduler.decay_ratio": Number(name="ratio", low=0, at_most=1, example=0.2),
    "precision.param_dtype": DTYPE,
    "precision.compute_dtype": DTYPE,
    "parallelism.activation_checkpointing": OneOf(("none", "full", "selective", "offload")),
    "parallelism.nproc_per_node": OPTIONAL_COUNT,
    "parallelism.nnodes": COUNT,
    "parallelism.rdzv_endpoint": Text(optional=True, example="HOST:29400"),
    "parallelism.timeout_s": COUNT,
    "parallelism.max_restarts": Number(whole=True, low=0),
    "parallelism.replicate_degree": OPTIONAL_COUNT,
    "parallelism.shard_degree": OPTIONAL_COUNT,
    "trainer.epochs": OPTIONAL_COUNT,
    "trainer.max_steps": OPTIONAL_COUNT,
    "trainer.max_steps_per_epoch": OPTIONAL_COUNT,
    "trainer.batch_size": AnyOf((COUNT, OneOf(("auto",)))),
    "trainer.gradient_accumulation_steps": OPTIONAL_COUNT,
    "trainer.global_batch_size": OPTIONAL_COUNT,
    "trainer.max_grad_norm": Number(low=0, open_low=True, optional=True, example=1.0),
    "trainer.log_every_steps": COUNT,
    "trainer.max_skipped_steps": Number(whole=True, low=0),
    "trainer.spike_sigma": Number(low=0, open_low=True, optional=True, example=6.0),
    "trainer.profile_steps": ListOf(COUNT, length=2, optional=True, example=[4, 6]),
    "optimizer.beta2_decay": Number(at_most=0, example=-0.8),
    "optimizer.d": Number(low=0, open_low=True, example=1.0),
    "optimizer.ns_steps": COUNT,
    "optimizer.moment_bits": Number(whole=True, low=8, at_most=16),
    "checkpoint.every_steps": OPTIONAL_COUNT,
    "checkpoint.every_minutes": Number(low=0, open_low=True, optional=True, example=30),
    "checkpoint.keep_last": COUNT,
    "checkpoint.keep_best": Number(whole=True, low=0),
    "evaluation.metric": OneOf(("val/loss", "val/perplexity", "val/exact_match"), prefix="val/exact_match/"),
    "evaluation.every_steps": OPTIONAL_COUNT,
    "evaluation.patience": OPTIONAL_COUNT,
    "evaluation.batch_size": COUNT,
    "evaluation.max_batches": OPTIONAL_COUNT,
    "evaluation.n_samples": Number(whole=True, low=0),
    "evaluation.max_new_tokens": COUNT,
    "logger.wandb.project": Text(),
    "logger.wandb.entity": Text(optional=True),
    "logger.wandb.group": Text(optional=True),
    "logger.wandb.job_type": Text(optional=True),
    "logger.wandb.tags": ListOf(Text()),
}


def rule_for(key: str, default: Any) -> Rule | None:
    """The rule of the table, else one for the default's type; None when the default tells no type."""
    key = re.sub(r"^dataset\.sets\.[^.]+\.", "dataset.", key)  # one of a mixture's sets: as a set alone
    if key in RULES:
        return RULES[key]
    if isinstance(default, str) and "${" in default:
        return None
    return _RULE_OF_TYPE.get(type(default))


_RULE_OF_TYPE: dict[type, Rule] = {
    bool: Flag(),
    int: Number(whole=True),
    float: Number(),
    str: Text(),
}
