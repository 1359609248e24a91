"""What documents begin with in common, computed once: the documents of a micro-batch folded into a tree.

Rows of one template begin alike, and so do the conversations of one system prompt. Under causal attention what a model
makes of a token depends on that token and those before it, so in every document that begins the same it is the same
number, and its gradient is the sum of theirs. A *node* of the tree is a token together with all that stand before it.
Embedding, norms, projections, feed-forward and head compute nodes; attention alone still sees whole documents, of which
each token is a copy of its node. Loss and gradients are those of the documents, up to the rounding of other sums.

For preference pairs: Wang & Hegde 2024, arXiv:2410.20305. Nothing here knows of templates: what is alike is found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ftlab.shapes import rounded_up


@dataclass(frozen=True)
class Take:
    """``x[rows]``, for rows that are taken several times or never; on any device its gradient has one order of sums.

    Attributes:
        rows: (N,) int64, each below R.
        places: (N,) int64, the places of ``rows`` in the order of the rows that they take.
        begins: (R,) int64, where in ``places`` those of each row begin.
    """

    rows: Tensor
    places: Tensor
    begins: Tensor

    @classmethod
    def of(cls, rows: np.ndarray, n_rows: int) -> Take:
        """Take ``rows`` (N,) of something with ``n_rows``."""
        counts = np.bincount(rows, minlength=n_rows)
        arrays = rows, np.argsort(rows, kind="stable"), np.cumsum(counts) - counts
        return cls(*(torch.from_numpy(array.astype(np.int64, copy=False)) for array in arrays))

    def __call__(self, x: Tensor) -> Tensor:
        """x: (R, ...) -> (N, ...)."""
        taken: Tensor = _Take.apply(x.flatten(1), self.rows, self.places, self.begins)
        return taken.unflatten(1, x.shape[1:])

    def each(self, change: Callable[[Tensor], Tensor]) -> Take:
        """The same with changed tensors: moved to a device, or pinned."""
        return Take(change(self.rows), change(self.places), change(self.begins))


@dataclass(frozen=True)
class Tree:
    """Documents one after the other, in N places, as U nodes; M of these are targets.

    Attributes:
        n_nodes: how many of the U nodes there are because a document has them; the rest, at the end, fill up.
        tokens: the documents' tokens, of nodes.
        nodes: nodes, of the documents' tokens: the first that is each of them.
        parents: the node before each target, which has to predict it.
    """

    n_nodes: int
    tokens: Take
    nodes: Take
    parents: Take

    def each(self, change: Callable[[Tensor], Tensor]) -> Tree:
        """The same with changed tensors: moved to a device, or pinned."""
        return Tree(self.n_nodes, self.tokens.each(change), self.nodes.each(change), self.parents.each(change))


@dataclass(frozen=True)
class Folded:
    """What folding finds.

    Attributes:
        order: the documents in the order in which the tree has them, those that begin alike side by side.
        tree: of the documents in this order.
        tokens: (U,) int64, the token of each node.
        targets: (M,) int64, the token of each node that counts as a target anywhere.
        weights: (M,) float32, how much it counts in all documents together.
    """

    order: list[int]
    tree: Tree
    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def fold(documents: Sequence[np.ndarray], trained: Sequence[np.ndarray], n_places: int) -> Folded:
    """Find what ``documents`` begin with in common.

    Args:
        documents: token ids, none empty.
        trained: how much each of these tokens counts as a target: bool, or numbers that are not negative. The first
            of a document never counts.
        n_places: N, at least as many as the documents have tokens. Those left over, at the end, hold the first node,
            and nothing reads them.
    """
    documents = [document.astype(np.int64, copy=False) for document in documents]
    # By their bytes, which is no order of numbers, but brings together what begins alike.
    order = sorted(range(len(documents)), key=lambda i: documents[i].tobytes())
    paths, n_nodes = [], 0
    before = path = np.empty(0, dtype=np.int64)
    for document in (documents[i] for i in order):
        n_both = min(len(before), len(document))
        differs = np.flatnonzero(before[:n_both] != document[:n_both])
        n_shared = differs[0] if len(differs) else n_both
        own = np.arange(n_nodes, n_nodes + len(document) - n_shared)
        path, before, n_nodes = np.concatenate([path[:n_shared], own]), document, n_nodes + len(own)
        paths.append(path)

    node_of = np.concatenate(paths)
    first = np.unique(node_of, return_index=True)[1]
    n_all = rounded_up(n_nodes)
    first = np.pad(first, (0, n_all - n_nodes))  # again the very first
    places = np.pad(node_of, (0, n_places - len(node_of)))
    tokens = np.concatenate([documents[i] for i in order])[first]
    counts = np.concatenate([np.concatenate([[0], trained[i][1:]]) for i in order])
    weights = np.bincount(node_of, counts, minlength=n_nodes)
    targets = np.flatnonzero(weights)
    tree = Tree(
        n_nodes=n_nodes,
        tokens=Take.of(places, n_all),
        nodes=Take.of(first, n_places),
        parents=Take.of(node_of[first[targets] - 1], n_all),
    )
    return Folded(order, tree, tokens, tokens[targets], weights[targets].astype(np.float32))


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor, begins: Tensor) -> Tensor:
        ctx.save_for_backward(places, begins)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *d_taken: Tensor) -> tuple[Tensor, None, None, None]:
        places, begins = ctx.saved_tensors
        # The sums of each row's gradients, rounded once; on a GPU, adding to rows in place would have no order.
        return F.embedding_bag(places, d_taken[0].contiguous(), begins, mode="sum"), None, None, None
