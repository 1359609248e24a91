"""Parameters that are divided over ranks: which rows this one holds, and how rank 0 gets to see all of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

_PIECE_BYTES = 4 * 2**20


def this_rank() -> int:
    """This process among all; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all ranks, if there are several."""
    if dist.is_initialized():
        dist.barrier()


def held_rows(parameter: Tensor) -> tuple[Tensor, slice]:
    """What this rank holds of ``parameter``, sharing its memory, and which rows (dim 0) of the whole those are.

    There may be none: 8 ranks share a matrix of 4 rows. A scalar counts as one row.
    """
    parameter = parameter.detach() if parameter.ndim else parameter.detach().view(1)
    if not isinstance(parameter, DTensor):
        return parameter, slice(0, parameter.shape[0])
    axis = _sharded_axis(parameter)
    rows = _shares(parameter, axis)[parameter.device_mesh.get_local_rank(axis)]
    local = parameter.to_local()
    assert len(local) == rows.stop - rows.start
    return local, rows


def own_rows(tensor: Tensor) -> tuple[Tensor, slice]:
    """The rows of ``tensor`` that it falls to this rank to write, so that all ranks together write each row once.

    Of what only this rank holds, all; what several ranks hold copies of (the groups of HSDP, all ranks of DDP, a
    counter anywhere) is divided among them.
    """
    local, rows = held_rows(tensor)
    copy, n_copies = _copy_of(tensor)
    share = -(-len(local) // n_copies)
    start, stop = min(copy * share, len(local)), min((copy + 1) * share, len(local))
    return local[start:stop], slice(rows.start + start, rows.start + stop)


def _copy_of(tensor: Tensor) -> tuple[int, int]:
    """Which of how many ranks with the same rows this one is."""
    if not dist.is_initialized():
        return 0, 1
    if not isinstance(tensor, DTensor):
        return dist.get_rank(), dist.get_world_size()
    number, count = 0, 1
    for axis, placement in enumerate(tensor.placements):
        if placement != Shard(0):
            size = tensor.device_mesh.size(axis)
            number, count = number * size + tensor.device_mesh.get_local_rank(axis), count * size
    return number, count


def all_rows(parameter: Tensor) -> Iterator[Tensor]:
    """On rank 0 the rows of ``parameter`` in order, in pieces of about 4 MiB on the host; elsewhere nothing.

    With sharded parameters every rank must exhaust it, in the same order. None holds more than its shard and
    one piece of another's.
    """
    local, _ = held_rows(parameter)
    rows_in_piece = max(1, _PIECE_BYTES * parameter.shape[0] // (parameter.numel() * parameter.itemsize))
    if not isinstance(parameter, DTensor):
        if this_rank() == 0:
            yield from (piece.cpu() for piece in local.split(rows_in_piece))
        return
    axis = _sharded_axis(parameter)
    group = parameter.device_mesh.get_group(axis)
    owners = dist.get_process_group_ranks(group)
    if 0 not in owners:  # these shards are replicas of those that rank 0 receives
        return
    for owner, rows in zip(owners, _shares(parameter, axis), strict=True):
        for start in range(rows.start, rows.stop, rows_in_piece):
            n_rows = min(rows_in_piece, rows.stop - start)
            if owner == this_rank():
                piece = local[start - rows.start :][:n_rows]
                if owner != 0:
                    dist.send(piece.contiguous(), dst=0, group=group)
            elif this_rank() == 0:
                piece = local.new_empty(n_rows, *parameter.shape[1:])
                dist.recv(piece, src=owner, group=group)
            if this_rank() == 0:
                yield piece.cpu()


def _sharded_axis(parameter: DTensor) -> int:
    """The axis of the mesh over which rows are divided; over the others they are repeated."""
    [axis] = [axis for axis, placement in enumerate(parameter.placements) if placement == Shard(0)]
    return axis


def _shares(parameter: DTensor, axis: int) -> list[slice]:
    """The rows of each rank along ``axis``, as ``torch.chunk`` divides: equal shares, the last ones may be less."""
    n_rows, n_ranks = parameter.shape[0], parameter.device_mesh.size(axis)
    share = -(-n_rows // n_ranks)
    bounds = [min(i * share, n_rows) for i in range(n_ranks + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]
