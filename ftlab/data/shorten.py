"""What becomes of a row that has more tokens than fit."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

TooLong = Literal["truncate", "truncate_keep_eos", "truncate_left", "split", "drop", "error"]


class Piece(NamedTuple):
    """What is left of a row, or a part of it: tokens, which are trained (or how much), and how many are prompt."""

    tokens: np.ndarray
    trained: np.ndarray
    prompt_len: int


def shorten(row: Piece, seq_len: int, policy: TooLong, *, end_id: int, bos_id: int | None) -> list[Piece]:
    """``row``, of more than ``seq_len`` tokens, as pieces that fit; those that would train nothing are left out.

    Args:
        policy: ``truncate`` cuts the end off and what ends the answer with it, so that a cut answer is never taught
            to stop; ``truncate_keep_eos`` cuts one token more and puts it back where an answer was cut, never into
            a question; ``truncate_left`` cuts after the BOS; ``split`` makes as many pieces as it takes, each after
            the first beginning with the last token of the one before, so that every token is a target once; ``drop``
            and ``error`` leave nothing.
        end_id: the token that ends the answer; negative for none.
    """
    tokens, trained, prompt_len = row
    match policy:
        case "truncate" | "truncate_keep_eos":
            kept, learned = tokens[:seq_len].copy(), trained[:seq_len].copy()
            if policy == "truncate_keep_eos" and end_id >= 0:
                if not learned[:-1].any():
                    return []
                # Where all of the prompt is trained, the mask tells questions from answers in the last one alone.
                told = prompt_len < seq_len - 1 or not trained[1:prompt_len].all()
                if told and learned[-2] and kept[-2] != end_id:
                    kept[-1], learned[-1] = end_id, learned[-2]
            pieces = [Piece(kept, learned, min(prompt_len, seq_len))]
        case "truncate_left":
            bos = int(tokens[0] == bos_id)
            cut = len(tokens) - seq_len
            left = np.concatenate([tokens[:bos], tokens[cut + bos :]])
            learned = np.concatenate([trained[:bos], trained[cut + bos :]])
            learned[0] = False
            pieces = [Piece(left, learned, max(prompt_len - cut, bos))]
        case "split":
            starts = range(0, len(tokens) - 1, seq_len - 1)
            pieces = [_part(row, start, seq_len) for start in starts]
        case _:
            pieces = []
    return [piece for piece in pieces if piece.trained.any()]


def _part(row: Piece, start: int, seq_len: int) -> Piece:
    tokens, trained = row.tokens[start : start + seq_len], row.trained[start : start + seq_len].copy()
    trained[0] = False
    return Piece(tokens, trained, min(max(row.prompt_len - start, 1), len(tokens)))
