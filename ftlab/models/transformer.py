"""The decoder-only Transformer of the Llama family and the sizes that define one."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftlab.errors import ConfigError
from ftlab.models.attention import Causal, Documents
from ftlab.models.layers import Attend, Attention, KVCache, LayerCache, RMSNorm, RotaryEmbedding, Rotation, SwiGLU
from ftlab.models.shards import held_rows

INIT_STD = 0.02
INIT_ROWS = 256  # drawn together, see Transformer.init_weights

# hidden (N, dim), head weight (V, dim), targets (N,) -> scalar
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The numbers that make one Transformer, and where its weights come from.

    Args:
        dim: width of the residual stream.
        n_layers: decoder blocks.
        n_heads: query heads, a divisor of dim.
        n_kv_heads: key/value heads, a divisor of n_heads; null: as many as query heads.
        head_dim: width of one head, even; null: dim / n_heads. Always an int once constructed, like
        n_kv_heads. ffn_hidden_dim: inner width of the feed-forward. vocab_size: rows of the embedding and
        of the head; null until the tokenizer is known. norm_eps: added to the mean square under RMSNorm's
        root. rope_theta: base of the rotary wavelengths. max_seq_len: longest sequence, tokens; positions
        beyond it do not exist. sliding_window: tokens that one attends to, itself included; null: all before it.
        tie_embeddings: the head uses the embedding's weight. checkpoint: folder or
        Hub id of pretrained weights; null: random weights.

    Raises:
        ConfigError: for shapes that cannot be built, naming the key.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None
    head_dim: int | None
    ffn_hidden_dim: int
    vocab_size: int | None
    norm_eps: float
    rope_theta: float
    max_seq_len: int
    sliding_window: int | None
    tie_embeddings: bool
    checkpoint: str | None

    def __post_init__(self) -> None:
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
        # Whole heads even where head_dim is free: transformers refuses to open a Llama export without.
        odd_by_default = self.head_dim is None and self.dim // self.n_heads % 2
        if self.dim % self.n_heads or odd_by_default:
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

    def _known_vocab_size(self) -> int:
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
        return Transformer(self)

    def n_params(self) -> int:
        """Exact number of parameters, by arithmetic alone.

        Raises:
            ConfigError: when vocab_size is still null.
        """
        assert self.n_kv_heads is not None  # __post_init__ resolved them
        assert self.head_dim is not None
        attention = 2 * self.dim * (self.n_heads + self.n_kv_heads) * self.head_dim
        block = attention + 3 * self.dim * self.ffn_hidden_dim + 2 * self.dim
        matrices_over_vocab = 1 if self.tie_embeddings else 2
        return matrices_over_vocab * self._known_vocab_size() * self.dim + self.n_layers * block + self.dim

    def n_matmul_params(self) -> int:
        """Parameters that multiply activations, for counting FLOPs: no norms, and no embedding but a tied one."""
        norms = (2 * self.n_layers + 1) * self.dim
        looked_up = 0 if self.tie_embeddings else self._known_vocab_size() * self.dim
        return self.n_params() - norms - looked_up


def _require_positive_int(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"model.{key}", f"{value!r} is not a whole number above 0")


class Block(nn.Module):
    """One decoder block: attention, then feed-forward, each on normalised input, added to the residual."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.n_kv_heads is not None  # ModelConfig resolved them
        assert config.head_dim is not None
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(
            dim=config.dim, n_heads=config.n_heads, n_kv_heads=config.n_kv_heads, head_dim=config.head_dim
        )
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = SwiGLU(dim=config.dim, hidden_dim=config.ffn_hidden_dim)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend, cache: LayerCache | None = None) -> Tensor:
        """x: (B, T, dim) -> (B, T, dim)."""
        x = x + self.attention(self.attention_norm(x), rotation, attend, cache)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """Decoder-only language model (Touvron et al. 2023, arXiv:2307.09288).

    Positions are 0 .. T-1, after those in the cache if there is one; in packed rows, of each document. Attention
    is causal, so tokens on the right (padding) never change what stands left of them and need no mask.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.head_dim is not None  # ModelConfig resolved it
        vocab_size = config._known_vocab_size()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.rotary = RotaryEmbedding(config.head_dim, config.max_seq_len, config.rope_theta)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        loss: Loss | None = None,
        *,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits, or the loss when one is given.

        The loss gets the head's weight instead of logits: it may never build all of them at once, and a
        sharded weight is only whole while forward runs.

        Args:
            tokens: (B, T) int64.
            targets: (B, T) int64, already shifted; needed with ``loss`` only.
            loss: called with hidden (B*T, dim), head weight (V, dim), targets (B*T,).
            doc_ids: (B, T) int, for rows packed with documents: tokens see only those with the same id around
                them, and positions begin at 0 in every document.
            cache: keys and values of earlier positions; T more are appended.

        Returns:
            (B, T, V) logits in the compute dtype, or the loss's scalar.

        Raises:
            ConfigError: for sequences longer than ``max_seq_len``.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.max_seq_len:
            raise ConfigError(
                "seq_len",
                f"a sequence of {end} tokens is longer than model.max_seq_len={self.config.max_seq_len}",
                fix=f"seq_len={self.config.max_seq_len}",
            )
        attend: Attend
        if doc_ids is None:
            rotation, attend = self.rotary(slice(start, end)), Causal(self.config.sliding_window)
        else:
            assert cache is None, "generation does not pack"
            attend = Documents(doc_ids, self.config.sliding_window)
            rotation = self.rotary(attend.positions)
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, rotation, attend) if cache is None else block(x, rotation, attend, cache.layers[i])
        hidden = self.norm(x)
        head_weight = self.embedding.weight if self.head is None else self.head.weight
        if loss is None:
            return F.linear(hidden, head_weight)
        assert targets is not None, "a loss needs targets"
        return loss(hidden.flatten(0, 1), head_weight, targets.flatten())

    def init_weights(self, seed: int) -> None:
        """Fill every parameter with fresh random values, in place; of sharded ones, the rows of this rank.

        The same seed gives the same values on every device, however parameters are sharded and, up to rounding,
        in every dtype: rows are drawn in blocks, on the CPU in float32, each block from a generator of its own,
        seeded by ``seed``, the parameter's name and the block's number. A rank draws the blocks that it holds
        rows of. One core draws about 70 M normals per second: a whole 7B model takes 1.5 minutes of it.
        """
        draws = [
            (name, local, rows, block)
            for name, parameter in self.named_parameters()
            for local, rows in [held_rows(parameter)]
            for block in range(rows.start // INIT_ROWS, -(-rows.stop // INIT_ROWS))
        ]
        with ThreadPoolExecutor(min(8, torch.get_num_threads())) as pool:
            list(pool.map(lambda draw: self._init_rows(seed, *draw), draws))

    @torch.no_grad()
    def _init_rows(self, seed: int, name: str, local: Tensor, rows: slice, block: int) -> None:
        """Draw one block of a parameter's rows into ``local``, which holds ``rows`` of it."""
        start = block * INIT_ROWS
        held = slice(max(start, rows.start), min(start + INIT_ROWS, rows.stop))
        destination = local[held.start - rows.start : held.stop - rows.start]
        if local.ndim == 1:  # RMSNorm weights
            destination.fill_(1.0)
            return
        digest = hashlib.sha256(f"{seed}:{name}:{block}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
        # Whole blocks, also where the parameter ends within one: its last rows are then the same in any length.
        drawn = torch.empty(INIT_ROWS, *local.shape[1:], dtype=torch.float32, device="cpu")
        drawn.normal_(0.0, self._init_std(name), generator=generator)
        destination.copy_(drawn[held.start - start : held.stop - start])

    def _init_std(self, name: str) -> float:
        config = self.config
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            # 2 * n_layers of them add up in the residual stream (GPT-2): this keeps the sum's size.
            return INIT_STD / math.sqrt(2 * config.n_layers)
        if name == ("embedding.weight" if config.tie_embeddings else "head.weight"):
            # Logits of unit-RMS hidden states have variance dim * std^2, which adds half of itself to the
            # first loss: 0.82 nats at dim 4096 with 0.02. This bound keeps it at ln(V) + 1/8 at most.
            return min(INIT_STD, 0.5 / math.sqrt(config.dim))
        return INIT_STD
