"""A pipeline schedule as data: for each rank, the list of actions that it executes, in order.

`megagpt/pipeline/executor.py` runs these lists, `simulate.py` computes their timing without running them, and the planner
compares them. `registry.py` lists the functions that build them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class ActionKind(Enum):
    """What an action computes for one micro-batch on one stage."""

    FORWARD = "F"
    """Forward pass."""
    BACKWARD = "B"
    """Full backward pass: gradients of the stage's input and of its weights."""
    BACKWARD_INPUT = "I"
    """Gradient of the stage's input only; a later BACKWARD_WEIGHT computes the weight gradients."""
    BACKWARD_WEIGHT = "W"
    """Weight gradients that a BACKWARD_INPUT left out."""

    __hash__ = object.__hash__  # each kind exists once; Enum's own hash is slow, and plans have millions of actions


class Action(NamedTuple):
    """One entry of a rank's list. `str()` gives for example `2F5`: forward of micro-batch 5 on stage 2."""

    kind: ActionKind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.micro_batch}"


@dataclass(frozen=True)
class Message:
    """A tensor that a rank receives for `stage`: an activation (kind FORWARD) or a gradient (kind BACKWARD)."""

    kind: ActionKind
    stage: int
    micro_batch: int
    source: int
    """Pipeline rank that sends it."""


@dataclass(frozen=True)
class Plan:
    """The actions of all pipeline ranks in one optimizer step (or one evaluation batch).

    A rank may have several stages (interleaved and V-shaped schedules); each stage is on one rank.
    """

    actions: tuple[tuple[Action, ...], ...]
    """Actions of each pipeline rank, in execution order."""
    rank_of_stage: tuple[int, ...]
    n_stages: int
    n_micro_batches: int

    @property
    def n_ranks(self) -> int:
        """Number of pipeline ranks."""
        return len(self.actions)

    @property
    def chunks_per_rank(self) -> int:
        """Number of stages on each rank."""
        return self.n_stages // self.n_ranks

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages of `rank`, ascending."""
        return tuple(stage for stage, owner in enumerate(self.rank_of_stage) if owner == rank)


def build_plan(orders: Sequence[Sequence[Action]], rank_of_stage: Sequence[int], micro_batches: int) -> Plan:
    """Return the plan with these action lists, one for each rank."""
    return Plan(tuple(map(tuple, orders)), tuple(rank_of_stage), len(rank_of_stage), micro_batches)


def forward_plan(rank_of_stage: Sequence[int], micro_batches: int) -> Plan:
    """Return a plan for evaluation: forwards only, on the stage placement of the training plan.

    Micro-batches run in groups. Within a group they start one unit of time apart; between groups a rank has time for its
    other stages.
    """
    ranks = 1 + max(rank_of_stage)
    stages = [[stage for stage, owner in enumerate(rank_of_stage) if owner == rank] for rank in range(ranks)]
    group_size = next((size for size in range(1, ranks) if all(_never_collide(own, size) for own in stages)), ranks)

    def start_time(forward: Action) -> int:
        group, index_in_group = divmod(forward.micro_batch, group_size)
        return group * group_size * len(stages[0]) + index_in_group + forward.stage

    orders = []
    for own in stages:
        forwards = [action for stage in own for action in actions_for(ActionKind.FORWARD, stage, range(micro_batches))]
        orders.append(sorted(forwards, key=start_time))
    return build_plan(orders, rank_of_stage, micro_batches)


def split_backward(plan: Plan) -> Plan:
    """Return `plan` with each full backward replaced by its two halves: the same work in the same order."""
    orders = [[half for action in order for half in _halves(action)] for order in plan.actions]
    return build_plan(orders, plan.rank_of_stage, plan.n_micro_batches)


def messages(plan: Plan, rank: int) -> list[Message]:
    """Return all messages that `rank` receives in one run: by source rank ascending, then in sending order.

    A receiver that posts its receives in this order always matches the sender. Neighbouring stages on the same rank
    exchange no message.
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
    """Return the message that `action` sends when it ends; None if no stage on another rank needs its result."""
    if action.kind is ActionKind.BACKWARD_WEIGHT:
        return None
    forward = action.kind is ActionKind.FORWARD
    target = action.stage + 1 if forward else action.stage - 1
    if not 0 <= target < plan.n_stages:
        return None
    source = plan.rank_of_stage[action.stage]
    if plan.rank_of_stage[target] == source:
        return None
    return Message(ActionKind.FORWARD if forward else ActionKind.BACKWARD, target, action.micro_batch, source)


def actions_for(kind: ActionKind, stage: int, micro_batches: Sequence[int]) -> list[Action]:
    """Return one action of `kind` on `stage` for each of `micro_batches`, in their order."""
    return [Action(kind, stage, micro_batch) for micro_batch in micro_batches]


def _halves(action: Action) -> tuple[Action, ...]:
    if action.kind is not ActionKind.BACKWARD:
        return (action,)
    return action._replace(kind=ActionKind.BACKWARD_INPUT), action._replace(kind=ActionKind.BACKWARD_WEIGHT)


def _never_collide(stages: Sequence[int], group_size: int) -> bool:
    """Return whether a rank's stages never have work at the same time.

    Stage s works for `group_size` units of time from time s on, once in each period.
    """
    period = group_size * len(stages)
    return len({(stage + index) % period for stage in stages for index in range(group_size)}) == period
