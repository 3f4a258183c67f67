"""V-Half and V-Min (Qi et al., arXiv 2405.15362): half and a third of 1F1B's activations on the V of `v_shape.py`.

Both repeat one micro-batch's actions every six units of time (an F, I or W of one stage takes one unit). How far apart
they stand decides how many micro-batches are under way, so how much is held. The repeated block is then squeezed: a
rank runs what it can as early as it can, without more held than the block holds.
"""

from collections import deque
from dataclasses import dataclass

from megagpt.pipeline.plan import Action, Kind, Plan, assemble
from megagpt.pipeline.v_shape import v_placement

PERIOD = 6
"""Units of time that a rank works on one micro-batch: F, I and W of two stages."""


@dataclass(frozen=True)
class Block:
    """When a micro-batch passes the ranks. Its F goes down the first stages and up the second ones, then its I likewise."""

    hops: tuple[int, int, int, int]
    """Units of time from one rank to the next: F down, F up, I down, I up."""
    turns: tuple[int, int, int]
    """Units of time from each of these to the following, on the rank where they meet. Six slots of a rank never collide."""
    most_live: int
    """The most (stage, micro-batch) pairs that a rank holds where the block is repeated for ever."""

    def slots(self, rank: int, ranks: int) -> dict[tuple[Kind, bool], int]:
        """The units of time at which micro-batch 0 is on `rank`, by kind and whether on its second stage."""
        below = ranks - 1 - rank
        up = (ranks - 1) * self.hops[0] + self.turns[0]
        back = up + (ranks - 1) * self.hops[1] + self.turns[1]
        home = back + (ranks - 1) * self.hops[2] + self.turns[2]
        return {
            (Kind.F, False): rank * self.hops[0],
            (Kind.F, True): up + below * self.hops[1],
            (Kind.I, True): back + rank * self.hops[2],
            (Kind.I, False): home + below * self.hops[3],
        }


def v_half(ranks: int, micro_batches: int) -> Plan:
    """Half of 1F1B's activations (ceil((ranks + 1) / 2) micro-batches) and at most half of its bubble."""
    turns = (1, 1, 2) if ranks % 2 else (4, 1, 5)
    return _squeezed(Block((1, 2, 1, 2), turns, most_live=2 * ((ranks + 2) // 2)), ranks, micro_batches)


def v_min(ranks: int, micro_batches: int) -> Plan:
    """A third of 1F1B's activations (ceil((ranks + 2) / 3) micro-batches) and at most two thirds of its bubble."""
    turns = (1, 1, 1) if ranks % 3 else (3, 1, 3)
    return _squeezed(Block((1, 1, 1, 1), turns, most_live=2 * ((ranks + 4) // 3)), ranks, micro_batches)


def _squeezed(block: Block, ranks: int, micro_batches: int) -> Plan:
    """The plan in which at every unit of time each rank runs the earliest of the block's actions that it can.

    Nothing waits for ever: of all that is left, what the block has earliest is ready, and the forwards of a rank keep
    the block's order, so that none takes the room of one before it.
    """
    workers = [_Worker(block, rank, ranks, micro_batches) for rank in range(ranks)]
    done: set[Action] = set()
    while any(worker.has_work for worker in workers):
        done.update([action for worker in workers if (action := worker.work(done)) is not None])
    return assemble([worker.order for worker in workers], v_placement(ranks), micro_batches)


class _Worker:
    """A rank at work: what it has run, and what it has still to run, by the block's times."""

    def __init__(self, block: Block, rank: int, ranks: int, micro_batches: int) -> None:
        self.order: list[Action] = []
        self._last_stage, self._most_live, self._live = 2 * ranks - 1, block.most_live, 0
        self._weights: deque[Action] = deque()
        self._time: dict[Action, int] = {}
        for (kind, second), slot in block.slots(rank, ranks).items():
            stage = self._last_stage - rank if second else rank
            self._time |= {Action(kind, stage, index): slot + PERIOD * index for index in range(micro_batches)}
        queue = sorted(self._time, key=self._time.__getitem__)
        forwards = deque(action for action in queue if action.kind is Kind.F)
        backwards = (
            deque(a for a in queue if a.kind is Kind.I and a.stage == stage) for stage in (rank, self._last_stage - rank)
        )
        self._queues = (forwards, *backwards)

    @property
    def has_work(self) -> bool:
        """Whether anything is left."""
        return bool(self._weights or any(self._queues))

    def work(self, done: set[Action]) -> Action | None:
        """Run one action whose inputs are in `done`; weight gradients where there is no other. None where all wait."""
        ready = [queue for queue in self._queues if queue and self._can_run(queue[0], done)]
        if ready:
            action = min(ready, key=lambda queue: self._time[queue[0]]).popleft()
        elif self._weights:
            action = self._weights.popleft()
        else:
            return None
        self.order.append(action)
        if action.kind is Kind.I:
            self._weights.append(Action(Kind.W, action.stage, action.micro_batch))
        else:
            self._live += 1 if action.kind is Kind.F else -1
        return action

    def _can_run(self, action: Action, done: set[Action]) -> bool:
        stage, index = action.stage, action.micro_batch
        if action.kind is Kind.F:
            return self._live < self._most_live and (stage == 0 or Action(Kind.F, stage - 1, index) in done)
        if stage == self._last_stage:
            return Action(Kind.F, stage, index) in done
        return Action(Kind.I, stage + 1, index) in done
