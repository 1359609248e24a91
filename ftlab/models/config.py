"""The numbers that define one Transformer."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftlab.errors import ConfigError
from ftlab.models.families import FAMILIES
from ftlab.models.rotary import Llama3RopeScaling

if TYPE_CHECKING:
    from ftlab.models.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The numbers that make one Transformer, and where its weights come from.

    Null sizes follow the others: once constructed, ``n_kv_heads`` and ``head_dim`` are numbers.

    Args:
        family: llama, mistral, qwen2 or qwen3; what that means is in ``families.py``.
        dim: width of the residual stream.
        n_layers: decoder blocks.
        n_heads: query heads; a divisor of dim unless head_dim is given.
        n_kv_heads: key/value heads, a divisor of n_heads; null: as many as query heads.
        head_dim: width of one head, even; null: dim / n_heads.
        ffn_hidden_dim: inner width of the feed-forward.
        vocab_size: rows of the embedding and of the head; null until the tokenizer is known.
        norm_eps: added to the mean square under RMSNorm's root.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: their stretching for long contexts; null: none.
        max_seq_len: longest sequence, tokens; positions beyond it do not exist.
        sliding_window: tokens that one attends to, itself included; null: all before it.
        tie_embeddings: the head uses the embedding's weight.
        checkpoint: folder, or Hub id with or without ``@revision``, of pretrained weights; null: random weights.

    Raises:
        ConfigError: for shapes that cannot be built, naming the key.
    """

    family: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None
    head_dim: int | None
    ffn_hidden_dim: int
    vocab_size: int | None
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    max_seq_len: int
    sliding_window: int | None
    tie_embeddings: bool
    checkpoint: str | None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            nearest = difflib.get_close_matches(str(self.family), FAMILIES, n=1, cutoff=0.0)
            known = ", ".join(FAMILIES)
            raise ConfigError("model.family", f"{self.family!r} is none of {known}", f"model.family={nearest[0]}")
        if self.sliding_window is not None and not FAMILIES[self.family].windows:
            problem = f"{self.sliding_window}, but the config.json of family {self.family} has no word for it"
            raise ConfigError("model.sliding_window", problem, "model.family=mistral")
        for key in ("dim", "n_layers", "n_heads", "ffn_hidden_dim", "max_seq_len"):
            _require_positive_int(key, getattr(self, key))
        for key in ("n_kv_heads", "head_dim", "vocab_size", "sliding_window"):
            if getattr(self, key) is not None:
                _require_positive_int(key, getattr(self, key))
        for key in ("norm_eps", "rope_theta"):
            value = getattr(self, key)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ConfigError(f"model.{key}", f"{value!r} is not a number above 0")
        # Frozen for everyone else; null means "follow the other sizes", and readers want the number.
        object.__setattr__(self, "head_dim", self._width_of_head())
        object.__setattr__(self, "n_kv_heads", self._kv_heads())

    def _kv_heads(self) -> int:
        n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        if self.n_heads % n_kv_heads:
            raise ConfigError(
                "model.n_kv_heads",
                f"{n_kv_heads} does not divide model.n_heads={self.n_heads}: key heads serve equally many",
                fix=f"model.n_kv_heads={math.gcd(self.n_heads, n_kv_heads)}",
            )
        return n_kv_heads

    def _width_of_head(self) -> int:
        whole = self.head_dim is None or FAMILIES[self.family].whole_heads
        odd_by_default = self.head_dim is None and self.dim // self.n_heads % 2
        if (whole and self.dim % self.n_heads) or odd_by_default:
            fitting = [n for n in range(1, self.n_heads + 1) if self.dim % (2 * n) == 0]
            raise ConfigError(
                "model.n_heads",
                f"model.dim={self.dim} does not split into {self.n_heads} heads of equal and even width "
                "(rotary embedding turns pairs)",
                fix=f"model.n_heads={fitting[-1]}" if fitting else "an even model.dim",
            )
        head_dim = self.dim // self.n_heads if self.head_dim is None else self.head_dim
        if head_dim % 2:
            raise ConfigError(
                "model.head_dim",
                f"{head_dim} is odd: rotary embedding turns pairs",
                fix=f"model.head_dim={head_dim + 1}",
            )
        return head_dim

    def known_vocab_size(self) -> int:
        """Rows of the embedding; refused while they are still open."""
        if self.vocab_size is None:
            raise ConfigError(
                "model.vocab_size",
                "null, and no tokenizer has filled it in",
                fix="model.vocab_size=32000",
            )
        return self.vocab_size

    def replace(self, **changes: object) -> ModelConfig:
        """A copy with some fields changed, e.g. ``replace(vocab_size=tokenizer.vocab_size)``."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def build(self) -> Transformer:
        """The model under the caller's ``torch.device`` context; its weights are to be initialised or loaded.

        On meta it costs milliseconds per block and no memory; from there ``to_empty`` and ``init_weights`` or
        ``load_weights`` make it real.

        Raises:
            ConfigError: when vocab_size is still null.
        """
        from ftlab.models.transformer import Transformer  # which knows this class

        return Transformer(self)

    def n_params(self) -> int:
        """Exact number of parameters, by arithmetic alone.

        Raises:
            ConfigError: when vocab_size is still null.
        """
        assert self.n_kv_heads is not None  # __post_init__ resolved them
        assert self.head_dim is not None
        traits = FAMILIES[self.family]
        norms = 2 * self.dim + (2 * self.head_dim if traits.qk_norm else 0)
        biases = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim if traits.qkv_bias else 0
        looked_up = 0 if self.tie_embeddings else self.known_vocab_size() * self.dim
        return self.n_matmul_params() + looked_up + self.n_layers * (norms + biases) + self.dim

    def n_matmul_params(self) -> int:
        """Parameters that multiply activations, for counting FLOPs: blocks' matrices and the head, tied or not."""
        assert self.n_kv_heads is not None  # __post_init__ resolved them
        assert self.head_dim is not None
        attention = 2 * self.dim * (self.n_heads + self.n_kv_heads) * self.head_dim
        return self.n_layers * (attention + 3 * self.dim * self.ffn_hidden_dim) + self.known_vocab_size() * self.dim


def _require_positive_int(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"model.{key}", f"{value!r} is not a whole number above 0")
