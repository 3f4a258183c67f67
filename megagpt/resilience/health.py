"""What to do with a step that went wrong: decided from numbers that are the same on all ranks, so that all do the same."""

import math
import statistics
from collections import deque
from typing import Literal, NamedTuple

from megagpt.config.schema import ResilienceConfig

Action = Literal["none", "stop", "skip", "rollback"]


class Verdict(NamedTuple):
    """Of one step."""

    action: Action
    reason: str = ""
    """What is wrong, for the log."""


FINE = Verdict("none")


class Health:
    """Looks at each step twice: at its loss before the update, and at its gradient when that is known."""

    def __init__(self, config: ResilienceConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._skipped = 0
        self._rollbacks = 0

    def of_loss(self, loss: float) -> Verdict:
        """Before the update, which is dropped for every verdict but `FINE`."""
        if not math.isfinite(loss):
            return Verdict(self._config.on_nonfinite, f"the loss is {loss}")
        most = self._most()
        if self._config.on_spike != "none" and loss > most:
            return Verdict(self._config.on_spike, f"the loss {loss:.4f} is a spike: above {most:.4f}")
        return FINE

    def of_gradient(self, skipped: bool, fp16: bool) -> Verdict:
        """After an update, `skipped` if the gradient was not finite."""
        if not skipped:
            return FINE
        if fp16:
            return Verdict(self._config.on_overflow, "the gradient overflowed in fp16")
        return Verdict(self._config.on_nonfinite, "the gradient is not finite")

    def settle(self, loss: float, verdict: Verdict) -> Verdict:
        """Count the step; "stop" in place of a verdict that has come too often."""
        if verdict.action == "none":
            self._losses.append(loss)
            self._skipped = 0
        elif verdict.action == "skip":
            self._skipped += 1
            if self._skipped > self._config.most_skipped:
                return Verdict("stop", f"{verdict.reason}, and {self._skipped} steps in a row had no update; "
                               f"resilience.most_skipped is {self._config.most_skipped}")  # fmt: skip
        elif verdict.action == "rollback":
            self._rollbacks += 1
            if self._rollbacks > self._config.most_rollbacks:
                return Verdict("stop", f"{verdict.reason}, after {self._rollbacks - 1} rollbacks; "
                               f"resilience.most_rollbacks is {self._config.most_rollbacks}")  # fmt: skip
        return verdict

    @property
    def memory(self) -> tuple[list[float], int]:
        """The last losses and the steps skipped in a row: for a checkpoint, so that a resumed run decides as any other."""
        return list(self._losses), self._skipped

    def load(self, losses: list[float], skipped: int) -> None:
        """What `memory` told. Rollbacks are counted on."""
        self._losses = deque(losses, maxlen=self._config.spike_window)
        self._skipped = skipped

    def _most(self) -> float:
        """Of a loss that is no spike."""
        if len(self._losses) < self._config.spike_window:
            return math.inf
        mean = statistics.fmean(self._losses)
        return mean + self._config.spike_deviations * max(statistics.pstdev(self._losses), 0.01 * abs(mean))
