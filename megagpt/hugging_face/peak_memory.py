"""Peak of this process's memory while tensors are converted one after the other."""

import re
from pathlib import Path


class PeakMemory:
    """Measures the memory that the process has allocated since the start of the measurement.

    Files that are mapped do not count: the system drops their pages when it needs memory.
    """

    def __init__(self) -> None:
        self._start = allocated_bytes()
        self._peak = self._start

    def sample(self) -> None:
        """Measure now; call it while the tensors of a conversion are in memory."""
        now = allocated_bytes()
        if now is not None and self._peak is not None:
            self._peak = max(self._peak, now)

    @property
    def bytes(self) -> int | None:
        """Largest measurement above the start; None if the system does not report it."""
        return None if self._start is None or self._peak is None else self._peak - self._start


def allocated_bytes() -> int | None:
    """Return the resident memory of this process that belongs to no file; None if the system does not report it."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
