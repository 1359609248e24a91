"""Text, one token at a time, from a model that is (or was) in training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ftlab.errors import ConfigError, DataError
from ftlab.models.auto import AnyModel


@torch.no_grad()
def generate(
    model: AnyModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    end_ids: Collection[int],
    temperature: float,
    top_p: float,
    seed: int,
    on_token: Callable[[int, int], None] | None = None,
    any_rank: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Continue every prompt until a token that ends it, ``max_new_tokens`` or the model's ``max_seq_len``.

    Prompts of equal length run as one batch, so no position is ever padding. Works under the caller's
    autocast and leaves the model in the mode (train or eval) it was in.

    Args:
        prompts: token ids, at least one each.
        max_new_tokens: per prompt.
        end_ids: each of them ends a row, and is never part of the result.
        temperature: divides the logits before sampling; 0 takes the most probable token.
        top_p: sampling is limited to the fewest most probable tokens that reach this probability, in (0, 1].
        seed: of the sampling; drawn on the CPU, so devices agree.
        on_token: called with (index of the prompt, new token) as tokens come, for streaming.
        any_rank: whether its argument is true on any rank that generates at the same time, each its own prompts;
            a collective. Where weights are sharded every forward is one too, so a rank that is done goes on
            computing, for nothing, until all are.

    Returns:
        The new tokens of each prompt, in the prompts' order.

    Raises:
        ConfigError: for a temperature or top_p out of range.
        DataError: for a prompt that is empty or longer than the model reads.
    """
    if temperature < 0:
        raise ConfigError("temperature", f"{temperature} is below 0", fix="temperature=0")
    if not 0 < top_p <= 1:
        raise ConfigError("top_p", f"{top_p} is not in (0, 1]", fix="top_p=1.0")
    rows_by_length = defaultdict(list)
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= model.config.max_seq_len:
            raise DataError(f"prompt {row} has {len(prompt)} tokens; the model reads 1 to {model.config.max_seq_len}")
        rows_by_length[len(prompt)].append(row)

    generator = torch.Generator("cpu").manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(dim=-1)
        return sample(logits, temperature=temperature, top_p=top_p, generator=generator)

    results: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        for length, rows in rows_by_length.items():
            n_new = min(max_new_tokens, model.config.max_seq_len - length)
            tokens = torch.tensor([prompts[row] for row in rows], device=next(model.buffers()).device)
            for new_tokens in _decode(model, tokens, n_new, end_ids, choose, any_rank):
                for row, token in zip(rows, new_tokens, strict=True):
                    if token is not None:
                        results[row].append(token)
                        if on_token is not None:
                            on_token(row, token)
        one_token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.buffers()).device)
        while any_rank(False):
            model(one_token)
    finally:
        model.train(was_training)
    return results


def _decode(
    model: AnyModel,
    tokens: Tensor,
    n_new: int,
    end_ids: Collection[int],
    choose: Callable[[Tensor], Tensor],
    any_rank: Callable[[bool], bool],
) -> Iterator[list[int | None]]:
    """Yield, step by step, the new token of each row of tokens (B, T); None for a row that has ended."""
    cache = model.new_cache(capacity=tokens.shape[1] + n_new)
    running = [True] * len(tokens)
    for _ in range(n_new):
        any_rank(True)
        chosen = choose(_last_logits(model, tokens, cache))
        ids = chosen.tolist()
        running = [runs and token not in end_ids for runs, token in zip(running, ids, strict=True)]
        if not any(running):
            return
        yield [token if runs else None for runs, token in zip(running, ids, strict=True)]
        tokens = chosen[:, None]  # finished rows go on too: cheaper than shrinking the cache


def _last_logits(model: AnyModel, tokens: Tensor, cache: Any) -> Tensor:
    """Logits (B, V) after the last token only: those of whole prompts can take gigabytes."""
    return model(tokens, tokens, _LastLogits(tokens.shape), cache=cache)


@dataclass(frozen=True)
class _LastLogits:
    """In a loss's place: rows of (B * T) positions to the logits of each row's last."""

    shape: torch.Size

    def __call__(self, hidden: Tensor, head_weight: Tensor, *_of_the_loss: Any) -> Tensor:
        return F.linear(hidden.unflatten(0, self.shape)[:, -1], head_weight)

    def of_logits(self, logits: Tensor, *_of_the_loss: Any) -> Tensor:
        return logits.unflatten(0, self.shape)[:, -1]


def sample(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Draw one token a row by nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751).

    Args:
        logits: (B, V), any float dtype and device.
        temperature: above 0.
        top_p: in (0, 1]; the most probable token is always among the candidates.
        generator: on the CPU.

    Returns:
        (B,) int64 on the logits' device.
    """
    probs = torch.softmax(logits.float().cpu() / temperature, dim=-1)
    probs, order = probs.sort(dim=-1, descending=True)
    mass_before = probs.cumsum(dim=-1) - probs
    candidates = probs.masked_fill(mass_before >= top_p, 0.0)
    drawn = torch.multinomial(candidates, num_samples=1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1).to(logits.device)
