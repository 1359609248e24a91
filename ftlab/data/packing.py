"""Several documents in one row: which go together, decided once, from their lengths alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Packing = Literal["none", "greedy", "best_fit"]


class Plan(NamedTuple):
    """Which documents are in which pack.

    Attributes:
        documents: (n,) the documents, pack after pack; within one in their own order.
        ends: (n_packs,) where each pack ends in ``documents``.
    """

    documents: np.ndarray
    ends: np.ndarray


def plan_packs(lengths: np.ndarray, capacity: int, packing: Packing) -> Plan:
    """Put documents of the given lengths, none above ``capacity``, into packs of at most ``capacity`` tokens.

    ``greedy`` fills packs in the order of the documents and looks at none again; ``best_fit`` puts the longest
    first, each into the fullest pack that still has room for it (best-fit decreasing), and leaves little unused.
    """
    assert len(lengths) == 0 or lengths.max() <= capacity, "documents are cut to seq_len before"
    packs = _greedy(lengths.tolist(), capacity) if packing == "greedy" else _best_fit(lengths, capacity)
    ends = np.cumsum([len(pack) for pack in packs], dtype=np.int64)
    return Plan(np.asarray([i for pack in packs for i in sorted(pack)], dtype=np.int64), ends)


def _greedy(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if length > room or not packs:
            packs.append([])
            room = capacity
        packs[-1].append(i)
        room -= length
    return packs


def _best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by the tokens they have room for
    rooms = 0  # bit r is set where with_room[r] is not empty: the next fitting one is found without a search
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(i)
        left = room - length
        with_room[left].append(pack)
        rooms |= 1 << left
    return packs
