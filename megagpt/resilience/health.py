"""What to do with a bad step. Decided from numbers that are equal on all ranks, so all ranks decide the same."""

import math
import statistics
from collections import deque
from typing import Literal, NamedTuple

from megagpt.config.schema import ResilienceConfig

Response = Literal["none", "stop", "skip", "rollback"]


class Verdict(NamedTuple):
    """What to do with one step, and why."""

    action: Response
    reason: str = ""
    """What is wrong, for the log."""


OK = Verdict("none")


class Health:
    """Checks each step's loss before the update, then its gradient."""

    def __init__(self, config: ResilienceConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._rollbacks = 0
        self.consecutive_skips = 0
        """Last steps without an update."""

    @property
    def recent_losses(self) -> list[float]:
        """Window of losses for spike detection. Saved in checkpoints, so that a resumed run decides as an unbroken one."""
        return list(self._losses)

    def check_loss(self, loss: float) -> Verdict:
        """Judge the loss, before the update. Any verdict but `OK` means that the update is not made."""
        if not math.isfinite(loss):
            return Verdict(self._config.on_nonfinite, f"the loss is {loss}")
        limit = self._loss_limit()
        if self._config.on_spike != "none" and loss > limit:
            return Verdict(self._config.on_spike, f"the loss {loss:.4f} is a spike: above {limit:.4f}")
        return OK

    def check_gradient(self, skipped: bool, fp16: bool) -> Verdict:
        """Judge the gradient, after the update. `skipped`: no update was made because the gradient is not finite."""
        if not skipped:
            return OK
        if fp16:
            return Verdict(self._config.on_overflow, "the gradient overflowed in fp16")
        return Verdict(self._config.on_nonfinite, "the gradient is not finite")

    def record(self, loss: float, verdict: Verdict) -> Verdict:
        """Update the counters; escalate to "stop" after too many skips or rollbacks."""
        config = self._config
        if verdict.action == "none":
            self._losses.append(loss)
            self.consecutive_skips = 0
        elif verdict.action == "skip":
            self.consecutive_skips += 1
            if self.consecutive_skips > config.max_skipped:
                reason = (
                    f"{verdict.reason}, and {self.consecutive_skips} steps in a row had no update; "
                    f"resilience.max_skipped is {config.max_skipped}"
                )
                return Verdict("stop", reason)
        elif verdict.action == "rollback":
            self._rollbacks += 1
            if self._rollbacks > config.max_rollbacks:
                reason = (
                    f"{verdict.reason}, after {self._rollbacks - 1} rollbacks; "
                    f"resilience.max_rollbacks is {config.max_rollbacks}"
                )
                return Verdict("stop", reason)
        return verdict

    def restore(self, recent_losses: list[float], consecutive_skips: int) -> None:
        """Restore the state of a checkpoint. The number of rollbacks is not reset."""
        self._losses = deque(recent_losses, maxlen=self._config.spike_window)
        self.consecutive_skips = consecutive_skips

    def _loss_limit(self) -> float:
        """Upper limit of a normal loss; infinite until the window is full."""
        if len(self._losses) < self._config.spike_window:
            return math.inf
        mean = statistics.fmean(self._losses)
        return mean + self._config.spike_num_std * max(statistics.pstdev(self._losses), 0.01 * abs(mean))
