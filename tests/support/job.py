"""Jobs of a megagpt command on several ranks, forked from a server that has imported everything.

The ranks are processes like those of a launcher: they connect to an address, have exit codes and receive signals. A real
launcher would import everything again in each process.
"""

import contextlib
import importlib
import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.pool import PRELOAD, skip_imported_objects_in_gc


class Job:
    """`world` ranks of a command. Each rank writes its output to `folder`/rank_N.log."""

    def __init__(
        self,
        world: int,
        arguments: Sequence[str],
        folder: Path,
        before: Callable[[int], None] | None = None,
        command: str = "pretrain",
    ) -> None:
        """Start the ranks. `command`: a module of megagpt.commands, whose `main` gets the arguments.

        `before`: a function of a module, which each rank calls with its number before its work, for example to make a
        fault happen.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank_{rank}.log" for rank in range(world)]
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        port = str(free_port())
        self.ranks = [
            context.Process(
                target=_rank,
                args=(list(sys.path), rank, world, port, command, list(arguments), str(log), before),
                daemon=True,
            )
            for rank, log in enumerate(self.logs)
        ]
        for process in self.ranks:
            process.start()

    def send(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some ranks; to all by default."""
        for rank in range(len(self.ranks)) if ranks is None else ranks:
            process = self.ranks[rank]
            if process.is_alive() and process.pid is not None:
                # It may have ended since: its parent, which collects it, is the fork server.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def finish(self, timeout: float, grace: float = 20.0) -> list[int | None]:
        """Wait for the end; return the exit codes by rank, negative for a signal.

        Like a launcher, kill the other ranks `grace` seconds after one has failed.
        Raises TimeoutError with the output of the ranks if they do not end.
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
        """Return the output of all ranks so far."""
        return "".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def wait_for(self, text: str, timeout: float = 60.0) -> None:
        """Wait until some rank has printed `text`. Raises TimeoutError, and AssertionError if the job ends before."""
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
    command: str,
    arguments: list[str],
    log: str,
    before: Callable[[int], None] | None,
) -> Any:
    """Run in the process of a rank."""
    skip_imported_objects_in_gc()
    sys.path[:] = path
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    variables = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in variables.items()} | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    main = importlib.import_module(f"megagpt.commands.{command}").main
    if before is not None:
        before(rank)
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
