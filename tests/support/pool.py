"""Eight rank processes, forked once per pytest session from a server that has imported everything.

Each call uses as many of them as its world needs. Starting new processes for every test would take seconds each.
"""

import gc
import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

RANKS = 8
AFTER_FAILURE = 5.0
"""Seconds to wait for the other ranks after one has failed."""
MAX_THREADS = 64
PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch._inductor",
    "deepspeed",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "safetensors.torch",
    "megagpt.commands.pretrain",
    "megagpt.resilience.watchdog",
    "megagpt.training.trainer",
]
"""Modules that the server imports before it forks ranks. Python starts one server per session, shared with `support.job`."""


class RankError(Exception):
    """A rank's exception, with its traceback as text."""


class Pool:
    """Runs functions on several ranks. The processes start at the first call."""

    def __init__(self) -> None:
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call `function(*args)` on `world` ranks that share a gloo process group; return the results, ordered by rank.

        Raises RankError if a rank raises, ends or does not answer in time. New processes then serve the next call.
        """
        self._start()
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(world):
                self._workers[rank][1].send((list(sys.path), rank, world, f"{folder}/store", function, args))
            answers = self._answers(world, timeout)
        failed = {rank: text for rank, (success, text) in answers.items() if not success}
        if failed or len(answers) < world:
            self.close()  # the state of a failed rank must not reach the next test
            silent = sorted(set(range(world)) - set(answers))
            texts = "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())
            raise RankError(f"ranks {sorted(failed)} failed, ranks {silent} did not answer\n{texts}")
        return [answers[rank][1] for rank in range(world)]

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._workers:
            connection.close()
            process.terminate()
            process.join(5)
        self._workers = []

    def _start(self) -> None:
        if self._workers:
            return
        for _ in range(RANKS):
            local, remote = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(remote,), daemon=True)
            process.start()
            remote.close()
            self._workers.append((process, local))

    def _answers(self, world: int, timeout: float) -> dict[int, tuple[bool, Any]]:
        """Return (success, result or traceback) by rank. After the first failure the others get `AFTER_FAILURE` seconds."""
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


def skip_imported_objects_in_gc() -> None:
    """Exclude what a forked process inherits from garbage collection, which would copy all of its memory: 0.3 s."""
    gc.freeze()


def _serve(connection: Connection) -> None:
    import torch

    from megagpt.distributed.process_group import use_batch_scheduling

    skip_imported_objects_in_gc()
    torch.set_num_threads(1)
    use_batch_scheduling()
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

    from megagpt.distributed import shared_gloo
    from megagpt.distributed.launcher import Launcher
    from megagpt.engine.deepspeed_internals import init_deepspeed

    timeout = timedelta(seconds=120)
    dist.init_process_group(shared_gloo.register(), init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    try:
        init_deepspeed(Launcher(rank, world, rank), "gloo", timeout)
        result = function(*args)
        dist.barrier()
        return result
    finally:
        deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None
        _end_threads_of_old_groups()


def _end_threads_of_old_groups() -> None:
    """Collect groups that are only part of reference cycles: their threads wake 100 times per second and slow all tests."""
    if len(list(Path("/proc/self/task").iterdir())) > MAX_THREADS:
        gc.collect()
