"""Items arrive in order and at most `depth` are prepared in advance; an error is raised in the place of its item."""

import threading
from collections.abc import Iterator

import pytest

from megagpt.data.prefetch import Prefetcher


def test_all_items_arrive_in_order() -> None:
    with Prefetcher(iter(range(100)), 3) as prefetched:
        assert list(prefetched) == list(range(100))


def test_an_error_is_raised_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    received = []
    with Prefetcher(items(), 5) as prefetched, pytest.raises(ValueError, match="third"):
        for item in prefetched:
            received.append(item)
    assert received == [1, 2]


def test_at_most_depth_items_are_prepared_in_advance_and_closing_ends_the_thread() -> None:
    prepared: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for number in range(1000):
            prepared.append(number)
            if number == 3:
                third.set()
            yield number

    with Prefetcher(items(), 2) as prefetched:
        iterator = iter(prefetched)
        assert next(iterator) == 0
        assert third.wait(10)  # one received, two in the queue, one waits for room
        assert len(prepared) == 4
    assert len(prepared) <= 6 and not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_the_time_that_the_consumer_waits_is_measured() -> None:
    with Prefetcher(iter([1]), 1) as prefetched:
        list(prefetched)
    assert prefetched.seconds_waited > 0
    assert prefetched.take_wait_seconds() > 0
    assert prefetched.seconds_waited == 0
