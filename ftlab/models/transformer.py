"""The decoder-only Transformer that Llama, Mistral, Qwen and SmolLM are sizes and options of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftlab import IGNORE_INDEX
from ftlab.errors import ConfigError
from ftlab.models import hf_layout
from ftlab.models.attention import Causal, Documents, FoldedDocuments
from ftlab.models.config import ModelConfig
from ftlab.models.families import FAMILIES
from ftlab.models.layers import Attend, Attention, KVCache, LayerCache, RMSNorm, SwiGLU
from ftlab.models.rotary import RotaryEmbedding, Rotation
from ftlab.models.shards import held_rows
from ftlab.prefixes import Tree

INIT_STD = 0.02
INIT_ROWS = 256  # drawn together, see Transformer.init_weights

# hidden (N, dim), head weight (V, dim), targets (N,) -> scalar
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """One decoder block: attention, then feed-forward, each on normalised input, added to the residual."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.n_kv_heads is not None  # ModelConfig resolved them
        assert config.head_dim is not None
        traits = FAMILIES[config.family]
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(
            dim=config.dim,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=traits.qkv_bias,
            qk_norm_eps=config.norm_eps if traits.qk_norm else None,
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
        vocab_size = config.known_vocab_size()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.rotary = RotaryEmbedding(config.head_dim, config.max_seq_len, config.rope_theta, config.rope_scaling)
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
        n_targets: int | None = None,
        weights: Tensor | None = None,
        tree: Tree | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits, or the loss when one is given.

        The loss gets the head's weight instead of logits: it may never build all of them at once, and a
        sharded weight is only whole while forward runs.

        Args:
            tokens: (B, T) int64.
            targets: (B, T) int64, already shifted; needed with ``loss`` only.
            loss: called with hidden (N, dim), head weight (V, dim), targets (N,), and weights (N,) if there are any.
            doc_ids: (B, T) int, for rows packed with documents: tokens see only those with the same id around
                them, and positions begin at 0 in every document.
            n_targets: how many of the targets count, where the host knows: only they are then taken to the head,
                N = n_targets, without asking the device; None: N = B*T.
            weights: (B, T) float32, how much each target counts; None: 1.
            tree: for documents that are folded: tokens are (1, U), targets and weights (M,), doc_ids (1, N).
            cache: keys and values of earlier positions; T more are appended.

        Returns:
            (B, T, V) logits in the compute dtype, or the loss's scalar.

        Raises:
            ConfigError: for sequences longer than ``max_seq_len``.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if tree is None and end > self.config.max_seq_len:  # a tree may have more nodes than a document tokens
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
            if tree is not None:
                attend = FoldedDocuments(attend, tree)
            rotation = self.rotary(attend.positions)
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, rotation, attend, cache=None if cache is None else cache.layers[i])
        head_weight = self.embedding.weight if self.head is None else self.head.weight
        if loss is None:
            return F.linear(self.norm(x), head_weight)
        assert targets is not None, "a loss needs targets"
        of_targets = [targets.flatten(), *([] if weights is None else [weights.flatten()])]
        x = x.flatten(0, 1)
        if tree is not None:
            x = tree.parents(x)
        elif n_targets is not None and n_targets < len(x):
            places = torch.nonzero_static(of_targets[0] != IGNORE_INDEX, size=n_targets)[:, 0]
            x, of_targets = x.index_select(0, places), [tensor.index_select(0, places) for tensor in of_targets]
        return loss(self.norm(x), head_weight, *of_targets)

    def new_cache(self, capacity: int) -> KVCache:
        """For ``forward``: room for the keys and values of so many positions."""
        return KVCache(self.config.n_layers, capacity)

    def hf_names(self) -> dict[str, str]:
        """Our parameter names -> those of a Hugging Face folder."""
        return hf_layout.hf_names(self.config)

    def hf_config(self, dtype: str) -> dict[str, object]:
        """The config.json of this model with weights in ``dtype``."""
        return hf_layout.hf_config(self.config, dtype)

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
        if local.ndim == 1:
            destination.fill_(0.0 if name.endswith(".bias") else 1.0)  # else the gain of an RMSNorm
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
