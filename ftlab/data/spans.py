"""Where in a text its tokens end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ftlab.data.tokenizers import Tokenizer


def token_cuts(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    tokens: np.ndarray,
    ends: np.ndarray,
    boundaries: Sequence[tuple[int, int]],
) -> tuple[np.ndarray, np.ndarray]:
    """For places in texts, how many tokens come before each, and whether one ends exactly there.

    Every token stands for a number of bytes, so running sums say where each one ends: no text is tokenised twice.
    Where that does not add up to the text (a tokenizer that rewrites it, an unknown character), tokens are decoded.

    Args:
        tokens: of all texts, one after another; those of text ``i`` end before ``ends[i]``.
        boundaries: (text, character) pairs.

    Returns:
        cuts: (n,) int64, tokens of the text that lie wholly before the place.
        aligned: (n,) bool.
    """
    if not boundaries:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
    sizes = tokenizer.token_bytes
    if sizes is None:
        cuts = np.zeros(len(boundaries), dtype=np.int64)
        aligned = adds_up = np.zeros(len(boundaries), dtype=bool)
    else:
        cuts, aligned, adds_up = _by_bytes(sizes[tokens], texts, ends, boundaries)
    for i in np.flatnonzero(~adds_up).tolist():
        text, place = boundaries[i]
        ids = tokens[ends[text - 1] if text else 0 : ends[text]].tolist()
        cuts[i], aligned[i] = _by_decoding(tokenizer, texts[text], ids, place)
    return cuts, aligned


def _by_bytes(
    sizes: np.ndarray, texts: Sequence[str], ends: np.ndarray, boundaries: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``token_cuts`` from the bytes of each token, and whether these added up to the text's."""
    which = np.asarray([text for text, _ in boundaries])
    last, first = ends[which], np.concatenate([[0], ends])[which]
    before = np.concatenate([[0], np.cumsum(np.maximum(sizes, 0), dtype=np.int64)])  # bytes before each token
    unknown = np.concatenate([[0], np.cumsum(sizes < 0)])
    text_bytes = {text: _n_bytes(texts[text]) for text in set(which.tolist())}
    # One more than the text has: the space that SentencePiece puts before it.
    extra = before[last] - before[first] - [text_bytes[text] for text, _ in boundaries]
    adds_up = ((extra == 0) | (extra == 1)) & (unknown[last] == unknown[first])
    targets = before[first] + extra + [_n_bytes(texts[text][:place]) for text, place in boundaries]
    cuts = np.clip(np.searchsorted(before, targets, side="right") - 1, first, last)
    # At the very start of a text there is nothing to straddle, only the space put before it.
    at_start = np.asarray([place == 0 for _, place in boundaries])
    return np.where(at_start, 0, cuts - first), (before[cuts] == targets) | at_start, adds_up


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _by_decoding(tokenizer: Tokenizer, text: str, ids: Sequence[int], place: int) -> tuple[int, bool]:
    """The same for one place, from the texts of growing runs of tokens."""
    if place == 0:
        return 0, True
    before = text[:place]
    alone = tokenizer.encode(before, bos=False, eos=False)
    if list(ids[: len(alone)]) == alone:
        return len(alone), True
    cut = next((i for i, token in enumerate(alone) if i >= len(ids) or ids[i] != token), len(alone))
    for n in range(cut + 1, len(ids) + 1):
        decoded = tokenizer.decode(ids[:n])
        if len(decoded.rstrip("\N{REPLACEMENT CHARACTER}")) > len(before):
            break
        if before.startswith(decoded):
            cut = n
    return cut, tokenizer.decode(ids[:cut]) == before
