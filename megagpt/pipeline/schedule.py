"""A pipeline schedule is data: for every rank, the list of what it computes, in order.

The executor runs these lists, `simulate.py` plays them without ranks and the planner costs them. A new
schedule is one new function here, with its name in `make_plan`.
"""

from dataclasses import dataclass, replace
from enum import Enum

from megagpt.config.schema import Schedule


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


def make_plan(name: Schedule, stages: int, micro_batches: int) -> Plan:
    """The plan of the schedule that the config names `name`."""
    makers = {"1f1b": one_f_one_b, "gpipe": gpipe}
    return makers[name](stages, micro_batches)


def one_f_one_b(stages: int, micro_batches: int) -> Plan:
    """One forward, one backward in turn (PipeDream-flush; Narayanan et al., arXiv 2104.04473, section 2.2.1).

    Rank r starts with as many forwards as there are stages after it, so it never holds the activations of
    more than `stages - r` micro-batches.
    """
    lists = []
    for stage in range(stages):
        ahead = min(stages - 1 - stage, micro_batches)
        order = _run(Kind.F, stage, range(ahead))
        for micro_batch in range(micro_batches - ahead):
            order += [Action(Kind.F, stage, ahead + micro_batch), Action(Kind.B, stage, micro_batch)]
        lists.append(order + _run(Kind.B, stage, range(micro_batches - ahead, micro_batches)))
    return _one_stage_per_rank(lists, micro_batches)


def gpipe(stages: int, micro_batches: int) -> Plan:
    """All forwards, then all backwards (Huang et al., arXiv 1811.06965): every activation is live at the turn."""
    every = range(micro_batches)
    return _one_stage_per_rank([_run(Kind.F, s, every) + _run(Kind.B, s, every) for s in range(stages)], micro_batches)


def forward_only(stages: int, micro_batches: int) -> Plan:
    """Evaluation: the forwards, in order."""
    return _one_stage_per_rank([_run(Kind.F, stage, range(micro_batches)) for stage in range(stages)], micro_batches)


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


def _run(kind: Kind, stage: int, micro_batches: range) -> list[Action]:
    return [Action(kind, stage, micro_batch) for micro_batch in micro_batches]


def _one_stage_per_rank(lists: list[list[Action]], micro_batches: int) -> Plan:
    return Plan(tuple(map(tuple, lists)), tuple(range(len(lists))), len(lists), micro_batches)


def _halves(action: Action) -> tuple[Action, ...]:
    if action.kind is not Kind.B:
        return (action,)
    return replace(action, kind=Kind.I), replace(action, kind=Kind.W)
