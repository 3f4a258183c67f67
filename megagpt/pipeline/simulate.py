"""A plan played without ranks: when each action runs, how long ranks idle, what they hold, and whether it ends at all."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megagpt.pipeline.plan import Action, Kind, Plan, messages

Cost = Callable[[Action], float]
"""Duration of an action, in any unit of time."""


class ScheduleError(ValueError):
    """A plan that is not a schedule: the fault of the function that made it, never of a user."""


@dataclass(frozen=True)
class Simulation:
    """How a plan went. Times are in the unit of the costs given."""

    start: dict[Action, float]
    end: dict[Action, float]
    makespan: float
    """From 0 to the end of the last action of any rank."""
    idle_share: tuple[float, ...]
    """By rank: the share of the makespan in which it computes nothing (the bubble)."""
    peak_live: tuple[int, ...]
    """By rank: the most (stage, micro-batch) pairs whose activations are held at once, from F to the end of B or W.
    Without a backward nothing is held beyond its own F."""


def kind_costs(forward: float = 1.0, backward: float = 2.0, input_backward: float = 1.0, weight_backward: float = 1.0) -> Cost:
    """Costs by kind alone: F, B, I and W."""
    by_kind = {Kind.F: forward, Kind.B: backward, Kind.I: input_backward, Kind.W: weight_backward}
    return lambda action: by_kind[action.kind]


def simulate(plan: Plan, cost: Cost | None = None, transfer: float = 0.0, in_order: bool = True) -> Simulation:
    """Play `plan`: a rank runs its list in order, each action as soon as its inputs are there.

    `cost` defaults to F 1, B 2, I 1, W 1; `transfer` is the time a message is under way. Sends do not hold
    up the sender. With `in_order` a receiver takes a pair's messages exactly as they were sent and blocks
    on each, holding none back for later; without, it may. `transfers.py` may, and a V-shaped schedule, in
    which activations and gradients go the same way between two ranks, can need it.
    Raises ScheduleError for an action that is missing, double or on the wrong rank, for a deadlock (with
    what every stuck rank waits for), and with `in_order` for messages needed in another order than sent.
    """
    _check_complete(plan)
    if in_order:
        _check_message_order(plan)
    start, end = _play(plan, cost or kind_costs(), transfer)
    makespan = max(end.values(), default=0.0)
    busy = [sum(end[action] - start[action] for action in order) for order in plan.actions]
    idle = tuple(1.0 - time / makespan if makespan else 0.0 for time in busy)
    return Simulation(start, end, makespan, idle, tuple(_peak_live(order) for order in plan.actions))


def _play(plan: Plan, cost: Cost, transfer: float) -> tuple[dict[Action, float], dict[Action, float]]:
    start: dict[Action, float] = {}
    end: dict[Action, float] = {}
    position, free = [0] * plan.n_ranks, [0.0] * plan.n_ranks
    present = {action for order in plan.actions for action in order}
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(plan.actions):
            while position[rank] < len(order):
                action = order[position[rank]]
                needs = _needs(plan, action, present)
                if any(need not in end for need in needs):
                    break
                ready = [end[need] + (transfer if _crosses(plan, need, action) else 0.0) for need in needs]
                start[action] = max([free[rank], *ready])
                end[action] = free[rank] = start[action] + cost(action)
                position[rank] += 1
                moved = True
    stuck = [rank for rank, order in enumerate(plan.actions) if position[rank] < len(order)]
    if stuck:
        waits = []
        for rank in stuck:
            action = plan.actions[rank][position[rank]]
            missing = next(need for need in _needs(plan, action, present) if need not in end)
            waits.append(f"rank {rank} at {action} waits for {missing} of rank {plan.rank_of_stage[missing.stage]}")
        raise ScheduleError("deadlock: " + "; ".join(waits))
    return start, end


def _needs(plan: Plan, action: Action, present: set[Action]) -> list[Action]:
    """The actions whose results `action` reads."""
    kind, stage, micro_batch = action.kind, action.stage, action.micro_batch
    if kind is Kind.F:
        return [Action(Kind.F, stage - 1, micro_batch)] if stage else []
    if kind is Kind.W:
        return [Action(Kind.I, stage, micro_batch)]
    needs = [Action(Kind.F, stage, micro_batch)]
    if stage + 1 < plan.n_stages:
        whole = Action(Kind.B, stage + 1, micro_batch)
        needs.append(whole if whole in present else Action(Kind.I, stage + 1, micro_batch))
    return needs


def _crosses(plan: Plan, need: Action, action: Action) -> bool:
    return plan.rank_of_stage[need.stage] != plan.rank_of_stage[action.stage]


def _check_complete(plan: Plan) -> None:
    """Every stage has each micro-batch's F once, and (if anything goes backward) either its B or its I and W once."""
    if len(plan.rank_of_stage) != plan.n_stages or not set(plan.rank_of_stage) <= set(range(plan.n_ranks)):
        raise ScheduleError(f"rank_of_stage {plan.rank_of_stage} does not give each of {plan.n_stages} stages a rank")
    for rank, order in enumerate(plan.actions):
        for action in order:
            if not (0 <= action.stage < plan.n_stages and 0 <= action.micro_batch < plan.n_micro_batches):
                raise ScheduleError(f"rank {rank}: {action} is outside {plan.n_stages} stages x {plan.n_micro_batches}")
            owner = plan.rank_of_stage[action.stage]
            if owner != rank:
                raise ScheduleError(f"rank {rank}: {action} belongs to rank {owner}")
    counts = Counter(action for order in plan.actions for action in order)
    double = [action for action, count in counts.items() if count > 1]
    if double:
        raise ScheduleError(f"{double[0]} stands {counts[double[0]]} times")
    for action in _expected(plan, counts):
        if action not in counts:
            raise ScheduleError(f"{action} is missing on rank {plan.rank_of_stage[action.stage]}")


def _expected(plan: Plan, counts: Counter[Action]) -> Iterator[Action]:
    trains = any(action.kind is not Kind.F for action in counts)
    for stage in range(plan.n_stages):
        for micro_batch in range(plan.n_micro_batches):
            yield Action(Kind.F, stage, micro_batch)
            if not trains:
                continue
            halves = [Action(kind, stage, micro_batch) for kind in (Kind.I, Kind.W)]
            whole = Action(Kind.B, stage, micro_batch)
            if whole in counts and any(half in counts for half in halves):
                raise ScheduleError(f"{whole} stands beside a split backward of the same micro-batch")
            yield from halves if any(half in counts for half in halves) else [whole]


def _check_message_order(plan: Plan) -> None:
    for rank, order in enumerate(plan.actions):
        received = messages(plan, rank)
        for source in {message.source for message in received}:
            sent = [(message.kind, message.stage, message.micro_batch) for message in received if message.source == source]
            keys = set(sent)
            kinds = ((Kind.F if action.kind is Kind.F else Kind.B, action) for action in order if action.kind is not Kind.W)
            needed = [key for kind, action in kinds if (key := (kind, action.stage, action.micro_batch)) in keys]
            for have, want in zip(sent, needed, strict=True):
                if have != want:
                    raise ScheduleError(
                        f"order of messages: rank {rank} waits for {Action(*want)}'s input, "
                        f"but rank {source} sends {Action(*have)}'s before it"
                    )


def _peak_live(order: tuple[Action, ...]) -> int:
    if all(action.kind is Kind.F for action in order):
        return min(1, len(order))
    live = peak = 0
    for action in order:
        if action.kind is Kind.F:
            live += 1
            peak = max(peak, live)
        elif action.kind in (Kind.B, Kind.W):
            live -= 1
    return peak
