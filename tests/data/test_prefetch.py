"""Items come in order, no further ahead than asked; errors come where their item would have come."""

import threading
from collections.abc import Iterator

import pytest

from megagpt.data.prefetch import Prefetcher


def test_items_come_in_order_and_then_it_ends() -> None:
    with Prefetcher(iter(range(100)), 3) as ready:
        assert list(ready) == list(range(100))


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    found = []
    with Prefetcher(items(), 5) as ready, pytest.raises(ValueError, match="third"):
        for item in ready:
            found.append(item)
    assert found == [1, 2]


def test_no_more_is_made_than_asked_and_closing_ends_the_thread() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            if number == 3:
                third.set()
            yield number

    with Prefetcher(items(), 2) as ready:
        iterator = iter(ready)
        assert next(iterator) == 0
        assert third.wait(10)  # one handed out, two in the queue, one in hand
        assert len(made) == 4
    assert len(made) <= 6 and not any(thread.name == "ahead" for thread in threading.enumerate())


def test_the_time_that_the_user_waits_is_counted() -> None:
    with Prefetcher(iter([1]), 1) as ready:
        list(ready)
    assert ready.seconds_waited > 0
