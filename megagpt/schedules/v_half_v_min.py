"""V-Half and V-Min (Qi et al., arXiv 2405.15362): half and a third of 1F1B's activation memory, on the V placement.

Both repeat one pattern of actions for each micro-batch, 6 units of time apart (an F, I or W of one stage takes one unit).
The delays within the pattern determine how many micro-batches are in flight, and so the memory. The repeated pattern is
then compacted: each rank runs every action as early as it can, within the pattern's memory limit.
"""

from collections import deque
from dataclasses import dataclass

from megagpt.schedules.common import v_placement
from megagpt.schedules.plan import Action, ActionKind, Plan, build_plan

PERIOD = 6
"""Units of time that a rank works on one micro-batch: F, I and W of two stages."""


@dataclass(frozen=True)
class RepeatingPattern:
    """When one micro-batch is on which rank: F down the first stages and up the second ones, then I the same way."""

    hop_delays: tuple[int, int, int, int]
    """Units of time from one rank to the next: F down, F up, I down, I up."""
    turn_delays: tuple[int, int, int]
    """Units of time between two of these four passes, on the rank where they meet. Chosen so that a rank never has two
    actions at the same time."""
    max_activations: int
    """Maximum number of (stage, micro-batch) pairs with live activations on a rank, with infinitely many repetitions."""

    def start_times(self, rank: int, ranks: int) -> dict[tuple[ActionKind, bool], int]:
        """Return the start times of micro-batch 0 on `rank`, by (kind, whether on the rank's second stage)."""
        ranks_below = ranks - 1 - rank
        forward_up = (ranks - 1) * self.hop_delays[0] + self.turn_delays[0]
        backward_down = forward_up + (ranks - 1) * self.hop_delays[1] + self.turn_delays[1]
        backward_up = backward_down + (ranks - 1) * self.hop_delays[2] + self.turn_delays[2]
        return {
            (ActionKind.FORWARD, False): rank * self.hop_delays[0],
            (ActionKind.FORWARD, True): forward_up + ranks_below * self.hop_delays[1],
            (ActionKind.BACKWARD_INPUT, True): backward_down + rank * self.hop_delays[2],
            (ActionKind.BACKWARD_INPUT, False): backward_up + ranks_below * self.hop_delays[3],
        }


def v_half(ranks: int, micro_batches: int) -> Plan:
    """V-Half: half of 1F1B's activations (ceil((ranks + 1) / 2) micro-batches) and at most half of its bubble."""
    turn_delays = (1, 1, 2) if ranks % 2 else (4, 1, 5)
    pattern = RepeatingPattern((1, 2, 1, 2), turn_delays, max_activations=2 * ((ranks + 2) // 2))
    return _compact(pattern, ranks, micro_batches)


def v_min(ranks: int, micro_batches: int) -> Plan:
    """V-Min: a third of 1F1B's activations (ceil((ranks + 2) / 3) micro-batches) and at most two thirds of its bubble."""
    turn_delays = (1, 1, 1) if ranks % 3 else (3, 1, 3)
    pattern = RepeatingPattern((1, 1, 1, 1), turn_delays, max_activations=2 * ((ranks + 4) // 3))
    return _compact(pattern, ranks, micro_batches)


def _compact(pattern: RepeatingPattern, ranks: int, micro_batches: int) -> Plan:
    """Return the plan in which each rank, at each unit of time, runs the earliest action of the pattern that is ready.

    This cannot deadlock: of all remaining actions, the earliest one in the pattern is ready, and a rank's forwards keep the
    pattern's order, so none takes the memory of an earlier one.
    """
    builders = [_RankOrder(pattern, rank, ranks, micro_batches) for rank in range(ranks)]
    done: set[Action] = set()
    while any(builder.has_work for builder in builders):
        executed = [builder.run_next(done) for builder in builders]
        done.update(action for action in executed if action is not None)
    return build_plan([builder.order for builder in builders], v_placement(ranks), micro_batches)


class _RankOrder:
    """Builds one rank's action list, one unit of time after the other."""

    def __init__(self, pattern: RepeatingPattern, rank: int, ranks: int, micro_batches: int) -> None:
        self.order: list[Action] = []
        self._last_stage = 2 * ranks - 1
        self._max_activations = pattern.max_activations
        self._activations = 0
        self._weight_gradients: deque[Action] = deque()
        self._pattern_time: dict[Action, int] = {}
        first_stage, second_stage = rank, self._last_stage - rank
        for (kind, on_second_stage), start in pattern.start_times(rank, ranks).items():
            stage = second_stage if on_second_stage else first_stage
            for micro_batch in range(micro_batches):
                self._pattern_time[Action(kind, stage, micro_batch)] = start + PERIOD * micro_batch
        by_time = sorted(self._pattern_time, key=self._pattern_time.__getitem__)
        forwards = deque(action for action in by_time if action.kind is ActionKind.FORWARD)
        backwards = [action for action in by_time if action.kind is ActionKind.BACKWARD_INPUT]
        self._queues = (
            forwards,
            deque(action for action in backwards if action.stage == first_stage),
            deque(action for action in backwards if action.stage == second_stage),
        )

    @property
    def has_work(self) -> bool:
        """Whether any action is left."""
        return bool(self._weight_gradients or any(self._queues))

    def run_next(self, done: set[Action]) -> Action | None:
        """Append one action whose inputs are in `done` and return it; None if all actions must wait.

        Weight gradients run only if no other action is ready.
        """
        ready = [queue for queue in self._queues if queue and self._is_ready(queue[0], done)]
        if ready:
            action = min(ready, key=lambda queue: self._pattern_time[queue[0]]).popleft()
        elif self._weight_gradients:
            action = self._weight_gradients.popleft()
        else:
            return None
        self.order.append(action)
        if action.kind is ActionKind.FORWARD:
            self._activations += 1
        elif action.kind is ActionKind.BACKWARD_INPUT:
            self._weight_gradients.append(Action(ActionKind.BACKWARD_WEIGHT, action.stage, action.micro_batch))
        else:
            self._activations -= 1
        return action

    def _is_ready(self, action: Action, done: set[Action]) -> bool:
        stage, micro_batch = action.stage, action.micro_batch
        if action.kind is ActionKind.FORWARD:
            has_memory = self._activations < self._max_activations
            return has_memory and (stage == 0 or Action(ActionKind.FORWARD, stage - 1, micro_batch) in done)
        if stage == self._last_stage:
            return Action(ActionKind.FORWARD, stage, micro_batch) in done
        return Action(ActionKind.BACKWARD_INPUT, stage + 1, micro_batch) in done
