"""Background prefetcher: a thread prepares items before they are needed."""

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class _End:
    """Marks the end of the items in the queue."""


class Prefetcher(Generic[T]):
    """Iterates over `items` in order; a thread prepares up to `depth` of them in advance.

    An exception of the iterable is raised in the place of its item. A `with` block ends the thread.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._queue: queue.Queue[T | BaseException | type[_End]] = queue.Queue(depth)
        self._stop = threading.Event()
        self.seconds_waited = 0.0
        """Time that the consumer has waited for items since the last `take_wait_seconds`."""
        self._thread = threading.Thread(target=self._fill, args=(items,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while True:
            start = time.perf_counter()
            item = self._queue.get()
            self.seconds_waited += time.perf_counter() - start
            if isinstance(item, BaseException):
                raise item
            if item is _End:
                return
            yield item  # type: ignore[misc]  # only items are left

    def take_wait_seconds(self) -> float:
        """Return `seconds_waited` and reset it."""
        seconds, self.seconds_waited = self.seconds_waited, 0.0
        return seconds

    def close(self) -> None:
        """End the thread, after the item that it is preparing."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()  # makes room for a thread that is blocked by a full queue
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _fill(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                if self._stop.is_set():
                    return
                self._queue.put(item)
        except BaseException as error:  # raised where the item would be used
            self._queue.put(error)
            return
        self._queue.put(_End)
