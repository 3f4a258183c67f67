"""How the ranks of a run find each other: through a store at the launcher's address, which rank 0 serves, or torchrun.

Rank 0 waits until all ranks have connected, and then publishes whether the run starts. A silent wait is explained after a
minute. Every key of the store has the number of the attempt in front, because torchrun keeps the store when it restarts ranks.
"""

import hashlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from megagpt.distributed.launcher import Launcher
from megagpt.errors import ConfigError, MegagptError, ReportedError, listed

TIMEOUT = timedelta(minutes=30)
"""Time limit for all ranks to connect. The topology's groups use `parallel.timeout_seconds`."""
PATIENCE = 60.0
"""Seconds until a rank that waits says so, and until an address that accepts connections must answer as a store."""
REFUSAL_SECONDS = 15.0
"""Time that rank 0 stays after an error, so that ranks which start more slowly can read that the run does not start."""
SAME_ERROR_SECONDS = 2.0
"""Time that the rank which serves the store stays after an error, so that other ranks can see that it was reported."""
_POLL_SECONDS = 0.1
_GO = "go"


def meet(launcher: Launcher) -> dist.Store:
    """Return the store, after all ranks have connected to it. Collective.

    Raises ConfigError if they cannot connect, and ReportedError if rank 0 refuses to start.
    """
    store = _open_store(launcher)
    if store.add(f"joined/{launcher.rank}", 1) > 1:
        raise ConfigError(
            f"rank {launcher.rank} is connected to {launcher.address}:{launcher.port} already; either another run uses this "
            f"port ({_other_port(launcher)}), or two processes were started as this rank"
        )
    if launcher.rank == 0:
        _wait_for(launcher, lambda: _missing(store, launcher), TIMEOUT.total_seconds())
        store.set("start", _GO)
    elif (text := store.get("start").decode()) != _GO:
        store.add("refusal_read", 1)
        raise ReportedError(int(text))
    return store


def refuse(launcher: Launcher, exit_code: int) -> None:
    """Publish on rank 0 that the run does not start; wait a few seconds until the other ranks have read it."""
    end = time.monotonic() + REFUSAL_SECONDS
    with suppress(RuntimeError, MegagptError):  # the other ranks then wait for the launcher to end them
        store = _open_store(launcher)
        store.set("start", str(exit_code))
        while store.add("refusal_read", 0) < launcher.world_size - 1 and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)


def is_first_report(store: dist.Store, launcher: Launcher, error: str) -> bool:
    """Return whether no other rank has reported the same error. The rank that serves the store waits a moment for others.

    True if the store does not answer.
    """
    try:
        first: bool = store.add(f"error/{hashlib.sha256(error.encode(errors='replace')).hexdigest()}", 1) == 1
        failed = store.add("failed", 1)
        if launcher.rank == 0 and not launcher.hosts_store:
            end = time.monotonic() + SAME_ERROR_SECONDS
            while failed < launcher.world_size and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
                failed = store.add("failed", 0)
    except RuntimeError:
        return True
    return first


def _open_store(launcher: Launcher) -> dist.Store:
    """Return this rank's connection to the store of this attempt; rank 0 serves it unless the launcher does."""
    serves = launcher.rank == 0 and not launcher.hosts_store
    store = _serve(launcher) if serves else _connect(launcher)
    store.set_timeout(TIMEOUT)
    return dist.PrefixStore(f"attempt_{launcher.attempt}", store)


def _serve(launcher: Launcher) -> dist.Store:
    patience = timedelta(seconds=PATIENCE)
    try:
        return dist.TCPStore(launcher.address, launcher.port, is_master=True, wait_for_workers=False, timeout=patience)
    except dist.DistNetworkError as error:
        text = str(error).splitlines()[0]
        if "EADDRINUSE" in text:
            raise ConfigError(
                f"port {launcher.port} of this host is in use, by another run or another program; {_other_port(launcher)}"
            ) from error
        if "EACCES" in text:
            raise ConfigError(f"port {launcher.port}: this user may not open it; {_other_port(launcher)}") from error
        raise ConfigError(
            f"rank 0 cannot reach its own address {launcher.address}:{launcher.port} (MASTER_ADDR): {text[:200]}"
        ) from error


def _connect(launcher: Launcher) -> dist.Store:
    """Return a connection to the store, once something accepts connections at the address.

    Raises ConfigError if that is no store. torch would wait for it without end.
    """
    _wait_for(launcher, lambda: _unreachable(launcher), TIMEOUT.total_seconds())
    stores: list[dist.Store] = []
    errors: list[RuntimeError] = []

    def ask() -> None:
        try:
            stores.append(dist.TCPStore(launcher.address, launcher.port, wait_for_workers=False, timeout=TIMEOUT))
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not stores:
        reason = f" ({str(errors[0]).splitlines()[0][:200]})" if errors else ""
        raise ConfigError(
            f"{launcher.address}:{launcher.port} accepts connections, but is not rank 0 of this run{reason}; "
            f"{_other_port(launcher)}"
        )
    return stores[0]


def _wait_for(launcher: Launcher, problem: Callable[[], str | None], seconds: float) -> None:
    """Wait until there is no problem. Report it once after `PATIENCE`; raise ConfigError after `seconds`."""
    start, reported = time.monotonic(), False
    while (text := problem()) is not None:
        waited = time.monotonic() - start
        if waited > seconds:
            raise ConfigError(f"{text}, after {seconds / 60:.0f} minutes")
        if waited > PATIENCE and not reported:
            reported = True
            # One line per node is enough, and one of rank 1 if all are on rank 0's node.
            if launcher.local_rank == 0 or launcher.rank == 1:
                print(f"[rank {launcher.rank}] waiting since {waited:.0f} s: {text}", file=sys.stderr, flush=True)
        time.sleep(_POLL_SECONDS)


def _missing(store: dist.Store, launcher: Launcher) -> str | None:
    keys = [f"joined/{rank}" for rank in range(launcher.world_size)]
    if store.check(keys):
        return None
    missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    connected = launcher.world_size - len(missing)
    ranks = f"rank{'s' if len(missing) > 1 else ''} {listed(map(str, missing))}"
    return f"{connected} of {launcher.world_size} ranks have connected to {launcher.address}:{launcher.port}; missing: {ranks}"


def _unreachable(launcher: Launcher) -> str | None:
    try:
        with socket.create_connection((launcher.address, launcher.port), timeout=5):
            return None
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be that of a host
        reason = getattr(error, "strerror", None) or str(error)
        return f"rank 0 does not accept connections at {launcher.address}:{launcher.port} ({reason})"


def _other_port(launcher: Launcher) -> str:
    return f"choose another one with {launcher.port_option}"
