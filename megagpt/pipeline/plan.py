"""A pipeline schedule is data: for every rank, the list of what it computes, in order.

The executor runs these lists, `simulate.py` plays them without ranks and the planner costs them. Who makes
them, see `schedule.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum


class Kind(Enum):
    """What an action computes for one micro-batch on one stage."""

    F = "F"
    """Forward."""
    B = "B"
    """Whole backward: the input's gradient and the weights'."""
    I = "I"  # noqa: E741
    """Backward for the input alone; the weights' part waits for its W."""
    W = "W"
    """Weight gradients that an I left over."""


@dataclass(frozen=True)
class Action:
    """One step of a rank's list; prints as `2F5`: forward of micro-batch 5 on stage 2."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.micro_batch}"


@dataclass(frozen=True)
class Message:
    """A tensor that a rank receives from another: an activation (kind F) or a gradient (kind B) for `stage`."""

    kind: Kind
    stage: int
    micro_batch: int
    source: int


@dataclass(frozen=True)
class Plan:
    """What every pipeline rank does in one optimizer step (or one evaluation batch).

    A rank may own several stages (interleaved and V-shaped schedules); a stage has one rank.
    """

    actions: tuple[tuple[Action, ...], ...]
    """By pipeline rank, in the order of execution."""
    rank_of_stage: tuple[int, ...]
    n_stages: int
    n_micro_batches: int

    @property
    def n_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.actions)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of `rank`, ascending."""
        return tuple(stage for stage, owner in enumerate(self.rank_of_stage) if owner == rank)


def assemble(orders: Sequence[Sequence[Action]], rank_of_stage: Sequence[int], micro_batches: int) -> Plan:
    """The plan of these lists, one for each rank."""
    return Plan(tuple(map(tuple, orders)), tuple(rank_of_stage), len(rank_of_stage), micro_batches)


def forward_plan(rank_of_stage: Sequence[int], micro_batches: int) -> Plan:
    """Evaluation: the forwards alone, on the stages that a training plan has placed.

    Micro-batches start one unit of time apart, in groups, between which a rank has time for its other stages.
    """
    ranks = 1 + max(rank_of_stage)
    stages = [[stage for stage, owner in enumerate(rank_of_stage) if owner == rank] for rank in range(ranks)]
    group = next((size for size in range(1, ranks) if all(_take_turns(own, size) for own in stages)), ranks)

    def time(forward: Action) -> int:
        number, place = divmod(forward.micro_batch, group)
        return number * group * len(stages[0]) + place + forward.stage

    orders = [[action for stage in own for action in in_turn(Kind.F, stage, range(micro_batches))] for own in stages]
    return assemble([sorted(order, key=time) for order in orders], rank_of_stage, micro_batches)


def split_backward(plan: Plan) -> Plan:
    """`plan` with every B as an I and, right after it, its W: the same work in the same order."""
    return replace(plan, actions=tuple(tuple(part for action in order for part in _halves(action)) for order in plan.actions))


def messages(plan: Plan, rank: int) -> list[Message]:
    """All that `rank` receives in one run of `plan`: by source rank ascending, and from each in the order it sends.

    A receiver that posts its receives in this order always matches the sender. Neighbouring stages on the
    same rank exchange no message.
    """
    received = []
    for source in range(plan.n_ranks):
        if source == rank:
            continue
        for action in plan.actions[source]:
            message = message_of(plan, action)
            if message is not None and plan.rank_of_stage[message.stage] == rank:
                received.append(message)
    return received


def message_of(plan: Plan, action: Action) -> Message | None:
    """What the end of `action` sends, if the stage that needs its result is on another rank."""
    if action.kind is Kind.W:
        return None
    forward = action.kind is Kind.F
    target = action.stage + 1 if forward else action.stage - 1
    if not 0 <= target < plan.n_stages:
        return None
    source = plan.rank_of_stage[action.stage]
    if plan.rank_of_stage[target] == source:
        return None
    return Message(Kind.F if forward else Kind.B, target, action.micro_batch, source)


def in_turn(kind: Kind, stage: int, micro_batches: Sequence[int]) -> list[Action]:
    """One action of `kind` on `stage` for each of `micro_batches`."""
    return [Action(kind, stage, micro_batch) for micro_batch in micro_batches]


def _halves(action: Action) -> tuple[Action, ...]:
    if action.kind is not Kind.B:
        return (action,)
    return replace(action, kind=Kind.I), replace(action, kind=Kind.W)


def _take_turns(stages: Sequence[int], group: int) -> bool:
    """Whether a rank's stages never have work at the same time, where stage s has it `group` times in a row from time s on."""
    period = group * len(stages)
    return len({(stage + place) % period for stage in stages for place in range(group)}) == period
