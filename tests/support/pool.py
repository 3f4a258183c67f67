"""Eight ranks, forked once for the whole pytest session from a server that has imported everything.

A world of any size up to 8 is carved from them for each call; starting ranks anew for every test would take 40 s each.
"""

import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

RANKS = 8
AFTER_FAILURE = 5.0
"""Seconds that the other ranks of a failed call are waited for."""
PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch._inductor",
    "deepspeed",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "safetensors.torch",
    "megagpt.training.engine",
]


class RankError(Exception):
    """A rank's exception, with its traceback as text."""


class Pool:
    """`run(world, function, *args)` calls `function(*args)` on `world` ranks with an open gloo group; results by rank."""

    def __init__(self) -> None:
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        self._start()
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(world):
                self._workers[rank][1].send((list(sys.path), rank, world, f"{folder}/store", function, args))
            answers = self._answers(world, timeout)
        failed = {rank: text for rank, (good, text) in answers.items() if not good}
        if failed or len(answers) < world:
            self.close()  # what a failed rank left behind must not reach the next test
            silent = sorted(set(range(world)) - set(answers))
            texts = "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())
            raise RankError(f"ranks {sorted(failed)} failed, ranks {silent} did not answer\n{texts}")
        return [answers[rank][1] for rank in range(world)]

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.terminate()
            process.join(5)
        self._workers = []

    def _start(self) -> None:
        if self._workers:
            return
        for _ in range(RANKS):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _answers(self, world: int, timeout: float) -> dict[int, tuple[bool, Any]]:
        """By rank, in the order of their coming: after the first failure the others have a moment to tell theirs."""
        waiting = {self._workers[rank][1]: rank for rank in range(world)}
        answers: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + timeout
        while waiting and time.monotonic() < end:
            for connection in wait(list(waiting), end - time.monotonic()):
                rank = waiting.pop(connection)  # type: ignore[index]
                try:
                    answers[rank] = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = (False, "the process ended")
                if not answers[rank][0]:
                    end = min(end, time.monotonic() + AFTER_FAILURE)
        return answers


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    while True:
        try:
            path, rank, world, store, function, args = connection.recv()
        except EOFError:
            return
        sys.path[:] = path
        try:
            answer = (True, _in_world(rank, world, store, function, args))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)


def _in_world(rank: int, world: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import deepspeed
    import torch.distributed as dist

    from megagpt.training.processes import join_deepspeed

    timeout = timedelta(seconds=120)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    try:
        join_deepspeed("gloo", timeout)
        result = function(*args)
        dist.barrier()
        return result
    finally:
        deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None
