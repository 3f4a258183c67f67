"""Which samples a data-parallel rank reads in which step, and a thread that has them ready.

Global batch `step` is samples [step * G, (step + 1) * G), whatever the layout; rank d of D takes the d-th part.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megagpt.data.blend import Dataset, check_ids


@dataclass(frozen=True)
class Rows:
    """Tokens of one micro-batch."""

    index: int
    """Of the micro-batch in the global batch, the same under every data-parallel size."""
    tokens: npt.NDArray[np.int64]
    """[batch, seq + 1]"""
    starts: npt.NDArray[np.bool_]
    """Where a document begins, [batch, seq + 1]."""


class GlobalBatches:
    """This data rank's micro-batches of any step, in O(1)."""

    def __init__(
        self, dataset: Dataset, global_batch_size: int, micro_batch_size: int, data_rank: int, data_size: int, vocab_size: int
    ) -> None:
        self._dataset, self._global, self._micro, self._vocab_size = dataset, global_batch_size, micro_batch_size, vocab_size
        part = global_batch_size // data_size
        self._rows = range(data_rank * part, (data_rank + 1) * part)

    def batch(self, step: int) -> list[Rows]:
        """Micro-batches of global batch `step`. Raises DataError for a token id above the vocabulary."""
        first = step * self._global
        found = []
        for row in range(self._rows.start, self._rows.stop, self._micro):
            samples = [self._dataset.sample(first + row + offset) for offset in range(self._micro)]
            tokens = np.stack([sample.tokens for sample in samples])
            check_ids(tokens.reshape(-1), self._vocab_size, f"sample {first + row}")
            starts = np.stack([sample.starts for sample in samples])
            found.append(Rows(row // self._micro, tokens, starts))
        return found


class Prefetcher:
    """Steps' batches in order, made by a thread a little ahead of their use."""

    def __init__(self, batches: GlobalBatches, first_step: int, last_step: int, ahead: int = 2) -> None:
        self._ready: queue.Queue[list[Rows] | BaseException] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._steps = range(first_step, last_step)
        self._thread = threading.Thread(target=self._fill, args=(batches,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[list[Rows]]:
        for _ in self._steps:
            found = self._ready.get()
            if isinstance(found, BaseException):
                raise found
            yield found

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _fill(self, batches: GlobalBatches) -> None:
        for step in self._steps:
            if self._stop.is_set():
                return
            try:
                found: list[Rows] | BaseException = batches.batch(step)
            except BaseException as error:  # raised where the batch is used
                found = error
            self._ready.put(found)
            if isinstance(found, BaseException):
                return
