"""Ranks find each other, a refusal of rank 0 ends all, and wrong ports and repeated ranks are explained."""

import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch.distributed as dist
from support.job import free_port

from megagpt.distributed import rendezvous
from megagpt.distributed.launcher import Launcher
from megagpt.distributed.rendezvous import is_first_report, meet, refuse
from megagpt.errors import ConfigError, ReportedError


def launchers(world_size: int, attempt: int = 0, port: int | None = None, hosts_store: bool = False) -> list[Launcher]:
    """Return the launchers of all ranks of one node."""
    port = port or free_port()
    return [
        Launcher(rank, world_size, rank, world_size, port=port, attempt=attempt, hosts_store=hosts_store)
        for rank in range(world_size)
    ]


def meet_in_threads(ranks: Sequence[Launcher]) -> list[dist.Store | Exception]:
    """Let each rank meet the others from a thread of its own; return its store, or its error."""

    def result(launcher: Launcher) -> dist.Store | Exception:
        try:
            return meet(launcher)
        except (ConfigError, ReportedError) as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(result, ranks))


@contextmanager
def torchrun_store() -> Iterator[int]:
    """Serve a store like torchrun; yield its port."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    yield store.port
    del store


def test_all_ranks_get_one_store() -> None:
    first, *others = meet_in_threads(launchers(3))
    assert isinstance(first, dist.Store)
    first.set("key", "value")
    for store in others:
        assert isinstance(store, dist.Store)
        assert store.get("key") == b"value"


@pytest.mark.parametrize("hosts_store", [False, True])
def test_a_refusal_of_rank_0_ends_the_other_ranks_with_its_exit_code(hosts_store: bool) -> None:
    with torchrun_store() as port:
        first, *others = launchers(3, port=port if hosts_store else None, hosts_store=hosts_store)
        with ThreadPoolExecutor(1) as thread:
            refusal = thread.submit(refuse, first, 2)
            errors = meet_in_threads(others)
            refusal.result(20)
    assert [type(error) for error in errors] == [ReportedError] * 2
    assert [getattr(error, "exit_code", None) for error in errors] == [2, 2]


def test_a_refusal_of_one_attempt_does_not_end_the_next() -> None:
    """torchrun keeps its store when it starts the ranks again."""
    with torchrun_store() as port:
        first, second = launchers(2, attempt=0, port=port, hosts_store=True)
        with ThreadPoolExecutor(1) as thread:
            refusal = thread.submit(refuse, first, 2)
            assert isinstance(meet_in_threads([second])[0], ReportedError)
            refusal.result(20)
        assert all(isinstance(store, dist.Store) for store in meet_in_threads(launchers(2, 1, port, hosts_store=True)))


def test_ranks_that_torchrun_starts_again_do_not_see_what_the_first_attempt_wrote() -> None:
    with torchrun_store() as port:
        for attempt in range(2):
            stores = meet_in_threads(launchers(2, attempt, port, hosts_store=True))
            for store in stores:
                assert isinstance(store, dist.Store)
                assert not store.check(["address"])
            assert isinstance(stores[0], dist.Store)
            stores[0].set("address", "of this attempt")


def test_two_processes_with_one_rank_are_refused() -> None:
    first, second = launchers(2)
    results = meet_in_threads([first, second, second])
    (error,) = [result for result in results if isinstance(result, Exception)]
    assert isinstance(error, ConfigError)
    assert f"rank 1 is connected to 127.0.0.1:{first.port} already" in str(error)
    assert "two processes were started as this rank" in str(error)
    assert "choose another one with MASTER_PORT" in str(error)


def test_a_port_in_use_is_named_with_the_option_that_changes_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        launcher = Launcher(0, 2, port=port, port_option="--master_port")
        with pytest.raises(ConfigError) as error:
            meet(launcher)
    assert str(error.value) == (
        f"port {port} of this host is in use, by another run or another program; choose another one with --master_port"
    )


def test_an_address_of_another_program_is_refused_by_the_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch itself would wait for an answer without end."""
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} accepts connections, but is not rank 0 of this run"):
            meet(Launcher(1, 2, 1, 2, port=port))


def test_an_address_that_is_not_of_this_host_is_refused_by_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.5)
    launcher = Launcher(0, 2, address="no-such-host.invalid", port=free_port())
    with pytest.raises(ConfigError, match=r"rank 0 cannot reach its own address no-such-host.invalid:\d+ \(MASTER_ADDR\)"):
        meet(launcher)


def test_a_long_wait_names_the_missing_ranks_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.2)
    monkeypatch.setattr(rendezvous, "TIMEOUT", timedelta(seconds=0.6))
    first, *_ = launchers(4)
    with pytest.raises(
        ConfigError, match=rf"1 of 4 ranks have connected to 127.0.0.1:{first.port}; missing: ranks 1, 2, 3, after"
    ):
        meet(first)
    assert capsys.readouterr().err.count("waiting since") == 1


def test_a_rank_without_rank_0_says_where_it_looks_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.2)
    monkeypatch.setattr(rendezvous, "TIMEOUT", timedelta(seconds=0.6))
    _, second = launchers(2)
    with pytest.raises(ConfigError, match=rf"rank 0 does not accept connections at 127.0.0.1:{second.port}"):
        meet(second)
    assert "[rank 1] waiting since" in capsys.readouterr().err


def test_one_error_of_many_ranks_is_reported_once() -> None:
    ranks = launchers(3)
    stores = meet_in_threads(ranks)
    reports = [(ranks[2], "a"), (ranks[1], "a"), (ranks[0], "b")]
    first = []
    for launcher, error in reports:
        store = stores[launcher.rank]
        assert isinstance(store, dist.Store)
        first.append(is_first_report(store, launcher, error))
    assert first == [True, False, True]
