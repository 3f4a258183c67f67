"""Observe a rank at the start of every phase of a step."""

from collections.abc import Callable

from megagpt.distributed.phase import PhaseTracker


class PhaseObserver(PhaseTracker):
    """Calls `observe` with the name of every phase that the rank enters, before its work starts. Pass it to an engine.

    The end of one phase is the start of the next, so two calls show what a phase has changed.
    """

    def __init__(self) -> None:
        self.observe: Callable[[str], None] | None = None
        super().__init__()

    def enter(self, phase: str) -> None:
        super().enter(phase)
        if self.observe is not None:
            self.observe(phase)
