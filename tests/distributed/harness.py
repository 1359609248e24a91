"""Ranks for tests: forked from one process that has torch imported, so that a trial takes a second and not ten.

The forking process is multiprocessing's forkserver: unlike pytest's own it has no threads that a fork would cut off.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from ftlab.distributed.env import WorkerEnv

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["pytest", "torch", "torch.distributed.fsdp", "torch.distributed._composable", "transformers", "ftlab.run"]
)


class RanksFailed(AssertionError):  # noqa: N818 -- what pytest shows first
    """Some rank raised, died or was too slow; the message has every traceback there is."""


def run_ranks(n: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 180.0) -> list[Any]:
    """``function(worker, *arguments)`` on ``n`` CPU ranks at once; what each returned, in rank order.

    ``function`` is one of a module's top level. None of the processes outlives the call.

    Raises:
        RanksFailed: with the tracebacks of all ranks that failed, once one did.
    """
    # The ranks meet here: no port has to be guessed.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    for rank in range(n):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_be_rank, args=(rank, n, store.port, theirs, function, arguments), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        return _collect(pipes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting and (ready := wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[call-overload]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                ok, value = False, "died without a word"
            (results if ok else failures)[rank] = value
        if failures:  # the others fail for want of this one: give them a moment to say so
            deadline = min(deadline, time.monotonic() + 2.0)
    if waiting and not failures:
        failures = dict.fromkeys(waiting.values(), "not done in time")
    if failures:
        raise RanksFailed("\n".join(f"--- rank {rank}:\n{text}" for rank, text in sorted(failures.items())))
    return [results[rank] for rank in range(len(pipes))]


def _be_rank(
    rank: int, n: int, port: int, pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    worker = WorkerEnv(
        rank=rank,
        local_rank=rank,
        world_size=n,
        local_world_size=n,
        device=torch.device("cpu"),
        store=dist.TCPStore("127.0.0.1", port, is_master=False),
    )
    try:
        message = (True, function(worker, *arguments))
    except BaseException:
        message = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(message))
