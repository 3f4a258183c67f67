"""An iterator that a thread runs a little ahead of its use."""

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class _End:
    """After the last item."""


class Ahead(Generic[T]):
    """Items of an iterable in their order, up to `depth` of them made before they are asked for.

    What the iterable raises is raised where its item would have come. A `with` block ends the thread.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._ready: queue.Queue[T | BaseException | type[_End]] = queue.Queue(depth)
        self._stop = threading.Event()
        self.seconds_waited = 0.0
        """Time that the user of the items has waited for them."""
        self._thread = threading.Thread(target=self._fill, args=(items,), name="ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while True:
            start = time.perf_counter()
            item = self._ready.get()
            self.seconds_waited += time.perf_counter() - start
            if isinstance(item, BaseException):
                raise item
            if item is _End:
                return
            yield item  # type: ignore[misc]  # only items are left

    def close(self) -> None:
        """End the thread, after the item that it is at."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()  # makes room for a thread that waits to hand over
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> "Ahead[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _fill(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                if self._stop.is_set():
                    return
                self._ready.put(item)
        except BaseException as error:  # raised where the item is used
            self._ready.put(error)
            return
        self._ready.put(_End)
