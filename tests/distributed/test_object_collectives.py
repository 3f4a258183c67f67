"""Python objects are exchanged between ranks, and an error of one rank is raised on all ranks."""

from typing import Any

import pytest
import torch.distributed as dist
from support.pool import Pool

from megagpt.distributed.object_collectives import all_gather_object, attempt, broadcast_object, run_on_ranks
from megagpt.errors import CheckpointError, ConfigError, MegagptError, StorageError


def gather(in_groups: bool) -> list[Any]:
    rank = dist.get_rank()
    group = None
    if in_groups:
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        group = groups[rank % 2]
    return all_gather_object({"rank": rank}, group)


def test_every_rank_gets_all_values_ordered_by_rank(ranks: Pool) -> None:
    assert ranks.run(3, gather, False) == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3


def test_values_stay_in_their_group(ranks: Pool) -> None:
    even, odd = [{"rank": 0}, {"rank": 2}], [{"rank": 1}, {"rank": 3}]
    assert ranks.run(4, gather, True) == [even, odd, even, odd]


def broadcast() -> Any:
    return broadcast_object("of rank 0" if dist.get_rank() == 0 else None)


def test_every_rank_gets_the_value_of_rank_0(ranks: Pool) -> None:
    assert ranks.run(3, broadcast) == ["of rank 0"] * 3


def fail_on(errors: dict[int, Exception], only_rank: int | None) -> Any:
    """Run an action that raises on some ranks; return its result or error on this rank, and whether the action ran here."""
    rank, ran = dist.get_rank(), []

    def action() -> str:
        ran.append(True)
        if rank in errors:
            raise errors[rank]
        return f"result {rank}"

    try:
        outcome: Any = run_on_ranks(action, only_rank)
    except MegagptError as error:
        outcome = (type(error), str(error))
    return outcome, bool(ran)


def test_an_action_runs_on_all_ranks(ranks: Pool) -> None:
    assert ranks.run(2, fail_on, {}, None) == [("result 0", True), ("result 1", True)]


def test_an_action_runs_on_one_rank_only(ranks: Pool) -> None:
    assert ranks.run(3, fail_on, {}, 1) == [(None, False), ("result 1", True), (None, False)]


def test_the_error_of_the_first_failed_rank_is_raised_on_all_ranks(ranks: Pool) -> None:
    errors: dict[int, Exception] = {1: ConfigError("first"), 2: CheckpointError("second")}
    assert ranks.run(3, fail_on, errors, None) == [((ConfigError, "first"), True)] * 3
    assert [outcome for outcome, _ in ranks.run(3, fail_on, errors, 2)] == [(CheckpointError, "second")] * 3


def test_an_error_of_the_operating_system_names_its_rank(ranks: Pool) -> None:
    outcomes = ranks.run(2, fail_on, {1: OSError("disk full")}, None)
    assert [outcome for outcome, _ in outcomes] == [(StorageError, "rank 1: disk full")] * 2


def test_other_errors_are_not_caught() -> None:
    def divide() -> float:
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        attempt(divide)


def test_an_attempt_returns_the_result_or_the_error() -> None:
    def refuse() -> None:
        raise ConfigError("no")

    assert attempt(lambda: 3) == (3, None)
    result, error = attempt(refuse)
    assert result is None and isinstance(error, ConfigError)
