"""Runs of pretrain_gpt.py on several ranks, forked from a server that has imported everything: 3 s to start, not 40.

The ranks are processes like any launcher's: they meet at an address, have exit codes, and take signals.
"""

import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.pool import PRELOAD


class Job:
    """`world` ranks of `pretrain_gpt.py ARGUMENTS`, each of which writes what it prints to `folder`/rank_N.log."""

    def __init__(self, world: int, arguments: Sequence[str], folder: Path, before: Callable[[int], None] | None = None) -> None:
        """`before`: a function of a module, called with the rank before its work, to make something go wrong in it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank_{rank}.log" for rank in range(world)]
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, "megagpt.training.trainer", "megagpt.commands.pretrain"])
        port = str(_free_port())
        self.ranks = [
            context.Process(
                target=_rank, args=(list(sys.path), rank, world, port, list(arguments), str(log), before), daemon=True
            )
            for rank, log in enumerate(self.logs)
        ]
        for process in self.ranks:
            process.start()

    def send(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """A signal to some ranks, all if None."""
        for rank in range(len(self.ranks)) if ranks is None else ranks:
            process = self.ranks[rank]
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def finish(self, timeout: float, grace: float = 20.0) -> list[int | None]:
        """Exit codes by rank, negative for a signal. As launchers do, ranks are killed `grace` seconds after one has failed.

        Raises TimeoutError, with what the ranks printed, where they do not end.
        """
        end, failed = time.monotonic() + timeout, False
        while any(process.is_alive() for process in self.ranks):
            if not failed and any(process.exitcode for process in self.ranks):
                failed, end = True, min(end, time.monotonic() + grace)
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                if not failed:
                    raise TimeoutError(self.output())
            for process in self.ranks:
                process.join(0.02)
        return [process.exitcode for process in self.ranks]

    def output(self) -> str:
        """What all ranks have printed."""
        return "".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def wait_for(self, text: str, timeout: float = 60.0) -> None:
        """Until some rank has printed `text`. Raises TimeoutError, and AssertionError where the job ends before."""
        end = time.monotonic() + timeout
        while text not in self.output():
            assert any(process.is_alive() for process in self.ranks) or text in self.output(), self.output()
            if time.monotonic() > end:
                raise TimeoutError(self.output())
            self.ranks[0].join(0.02)


def _rank(
    path: list[str],
    rank: int,
    world: int,
    port: str,
    arguments: list[str],
    log: str,
    before: Callable[[int], None] | None,
) -> Any:
    sys.path[:] = path
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    from megagpt.commands.pretrain import main

    if before is not None:
        before(rank)
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
