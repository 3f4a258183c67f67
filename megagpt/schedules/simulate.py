"""Simulate a plan without ranks: when each action runs, how long ranks idle, how much memory they need; find deadlocks."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megagpt.schedules.plan import Action, ActionKind, Plan, messages

Cost = Callable[[Action], float]
"""Duration of an action, in any unit of time."""


class ScheduleError(ValueError):
    """A plan that cannot run: a bug in the function that built it, never a user error."""


@dataclass(frozen=True)
class Simulation:
    """Timing and memory of a plan. Times are in the unit of the costs."""

    start: dict[Action, float]
    end: dict[Action, float]
    makespan: float
    """Time from 0 to the end of the last action of any rank."""
    idle_share: tuple[float, ...]
    """Share of the makespan in which a rank computes nothing (the bubble), for each rank."""
    peak_activations: tuple[int, ...]
    """Maximum number of (stage, micro-batch) pairs with live activations, for each rank. Activations live from the start of F
    to the end of B or W; in a plan without backwards, to the end of F."""


def kind_costs(forward: float = 1.0, backward: float = 2.0, input_backward: float = 1.0, weight_backward: float = 1.0) -> Cost:
    """Return costs that depend only on the kind of action."""
    by_kind = {
        ActionKind.FORWARD: forward,
        ActionKind.BACKWARD: backward,
        ActionKind.BACKWARD_INPUT: input_backward,
        ActionKind.BACKWARD_WEIGHT: weight_backward,
    }
    return lambda action: by_kind[action.kind]


def simulate(plan: Plan, cost: Cost | None = None, transfer: float = 0.0, in_order: bool = True) -> Simulation:
    """Simulate `plan`: each rank runs its list in order, each action as soon as its inputs have arrived.

    `cost` defaults to F 1, B 2, I 1, W 1. `transfer` is the travel time of a message; sends do not block the sender.
    With `in_order`, a receiver must use the messages of each sender in the order in which they were sent; without it, a
    receiver may store messages for later, as `megagpt/pipeline/transfers.py` does. V-shaped schedules can need that, since
    activations and gradients travel in the same direction between two of their ranks.
    Raises ScheduleError if an action is missing, duplicated or on the wrong rank; if there is a deadlock (the message says
    what each blocked rank waits for); and, with `in_order`, if messages are needed in another order than they are sent.
    """
    _check_complete(plan)
    if in_order:
        _check_message_order(plan)
    start, end = _start_and_end_times(plan, cost or kind_costs(), transfer)
    makespan = max(end.values(), default=0.0)
    busy = [sum(end[action] - start[action] for action in order) for order in plan.actions]
    idle = tuple(1.0 - time / makespan if makespan else 0.0 for time in busy)
    return Simulation(start, end, makespan, idle, tuple(_peak_activations(order) for order in plan.actions))


def step_time(plan: Plan, cost: Cost, transfer: float = 0.0) -> float:
    """Return the makespan that `simulate` computes without `in_order`, many times faster; see `finish_times`."""
    return max(finish_times(plan, cost, transfer))


def finish_times(plan: Plan, cost: Cost, transfer: float = 0.0) -> list[float]:
    """Return when each rank ends its last action, as `simulate` without `in_order` has it, faster; the plan is not checked.

    The cost must not depend on the micro-batch. Of an action's inputs only one can come from another rank or stage: the
    result of the neighbouring stage. The others are earlier in the rank's own list.
    Raises ScheduleError if there is a deadlock.
    """
    n_stages, n_micro, ranks = plan.n_stages, plan.n_micro_batches, plan.rank_of_stage
    costs = {kind: [cost(Action(kind, stage, 0)) for stage in range(n_stages)] for kind in ActionKind}
    # Travel time to each stage from the one before it and from the one after it.
    from_previous = [transfer if stage and ranks[stage - 1] != ranks[stage] else 0.0 for stage in range(n_stages)]
    from_next = [*from_previous[1:], 0.0]
    ends: list[float] = [-1.0] * (2 * n_stages * n_micro)  # of forwards, then of (input) backwards; -1: has not run
    waiting: dict[int, int] = {}  # result -> rank that waits for it
    next_index, free_at = [0] * plan.n_ranks, [0.0] * plan.n_ranks
    runnable = list(range(plan.n_ranks))
    while runnable:
        rank = runnable.pop()
        order, time = plan.actions[rank], free_at[rank]
        index = next_index[rank]
        while index < len(order):
            kind, stage, micro_batch = order[index]
            needed = result = -1
            arrival = 0.0
            if kind is ActionKind.FORWARD:
                result = stage * n_micro + micro_batch
                if stage:
                    needed, arrival = result - n_micro, from_previous[stage]
            elif kind is not ActionKind.BACKWARD_WEIGHT:
                result = (n_stages + stage) * n_micro + micro_batch
                if stage + 1 < n_stages:
                    needed, arrival = result + n_micro, from_next[stage]
            if needed >= 0:
                end = ends[needed]
                if end < 0:
                    waiting[needed] = rank
                    break
                time = max(time, end + arrival)
            time += costs[kind][stage]
            if result >= 0:
                ends[result] = time
                if result in waiting:
                    runnable.append(waiting.pop(result))
            index += 1
        next_index[rank], free_at[rank] = index, time
    if waiting:
        raise ScheduleError(f"deadlock: ranks {sorted(waiting.values())} wait for each other")
    return free_at


def peak_activations(plan: Plan) -> int:
    """Return the largest `Simulation.peak_activations` of any rank."""
    return max(_peak_activations(order) for order in plan.actions)


def _start_and_end_times(plan: Plan, cost: Cost, transfer: float) -> tuple[dict[Action, float], dict[Action, float]]:
    start: dict[Action, float] = {}
    end: dict[Action, float] = {}
    next_index = [0] * plan.n_ranks
    free_at = [0.0] * plan.n_ranks
    existing = {action for order in plan.actions for action in order}
    progress = True
    while progress:
        progress = False
        for rank, order in enumerate(plan.actions):
            while next_index[rank] < len(order):
                action = order[next_index[rank]]
                inputs = _inputs(plan, action, existing)
                if any(needed not in end for needed in inputs):
                    break
                arrivals = [end[needed] + (transfer if _on_other_ranks(plan, needed, action) else 0.0) for needed in inputs]
                start[action] = max([free_at[rank], *arrivals])
                end[action] = free_at[rank] = start[action] + cost(action)
                next_index[rank] += 1
                progress = True
    blocked = {rank: order[next_index[rank]] for rank, order in enumerate(plan.actions) if next_index[rank] < len(order)}
    if blocked:
        waits = []
        for rank, action in blocked.items():
            missing = next(needed for needed in _inputs(plan, action, existing) if needed not in end)
            waits.append(f"rank {rank} at {action} waits for {missing} of rank {plan.rank_of_stage[missing.stage]}")
        raise ScheduleError("deadlock: " + "; ".join(waits))
    return start, end


def _inputs(plan: Plan, action: Action, existing: set[Action]) -> list[Action]:
    """Return the actions whose results `action` reads."""
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind is ActionKind.FORWARD:
        return [Action(ActionKind.FORWARD, stage - 1, micro_batch)] if stage else []
    if action.kind is ActionKind.BACKWARD_WEIGHT:
        return [Action(ActionKind.BACKWARD_INPUT, stage, micro_batch)]
    inputs = [Action(ActionKind.FORWARD, stage, micro_batch)]
    if stage + 1 < plan.n_stages:
        full = Action(ActionKind.BACKWARD, stage + 1, micro_batch)
        inputs.append(full if full in existing else Action(ActionKind.BACKWARD_INPUT, stage + 1, micro_batch))
    return inputs


def _on_other_ranks(plan: Plan, first: Action, second: Action) -> bool:
    return plan.rank_of_stage[first.stage] != plan.rank_of_stage[second.stage]


def _check_complete(plan: Plan) -> None:
    """Raise ScheduleError unless the plan has exactly the required actions, each on the rank of its stage."""
    if len(plan.rank_of_stage) != plan.n_stages or not set(plan.rank_of_stage) <= set(range(plan.n_ranks)):
        raise ScheduleError(f"rank_of_stage {plan.rank_of_stage} does not give each of {plan.n_stages} stages a rank")
    for rank, order in enumerate(plan.actions):
        for action in order:
            if not (0 <= action.stage < plan.n_stages and 0 <= action.micro_batch < plan.n_micro_batches):
                raise ScheduleError(
                    f"rank {rank}: {action} is outside {plan.n_stages} stages x {plan.n_micro_batches} micro-batches"
                )
            owner = plan.rank_of_stage[action.stage]
            if owner != rank:
                raise ScheduleError(f"rank {rank}: {action} belongs to rank {owner}")
    counts = Counter(action for order in plan.actions for action in order)
    duplicates = [action for action, count in counts.items() if count > 1]
    if duplicates:
        raise ScheduleError(f"{duplicates[0]} appears {counts[duplicates[0]]} times")
    for action in _required_actions(plan, counts):
        if action not in counts:
            raise ScheduleError(f"{action} is missing on rank {plan.rank_of_stage[action.stage]}")


def _required_actions(plan: Plan, counts: Counter[Action]) -> Iterator[Action]:
    """Yield each stage's F for each micro-batch and, if the plan has backwards, either its B or both its I and W."""
    has_backwards = any(action.kind is not ActionKind.FORWARD for action in counts)
    for stage in range(plan.n_stages):
        for micro_batch in range(plan.n_micro_batches):
            yield Action(ActionKind.FORWARD, stage, micro_batch)
            if not has_backwards:
                continue
            halves = [
                Action(ActionKind.BACKWARD_INPUT, stage, micro_batch),
                Action(ActionKind.BACKWARD_WEIGHT, stage, micro_batch),
            ]
            full = Action(ActionKind.BACKWARD, stage, micro_batch)
            is_split = any(half in counts for half in halves)
            if full in counts and is_split:
                raise ScheduleError(f"{full} appears together with a split backward of the same micro-batch")
            yield from halves if is_split else [full]


def _check_message_order(plan: Plan) -> None:
    for rank, order in enumerate(plan.actions):
        received = messages(plan, rank)
        inputs = [
            (ActionKind.FORWARD if action.kind is ActionKind.FORWARD else ActionKind.BACKWARD, action.stage, action.micro_batch)
            for action in order
            if action.kind is not ActionKind.BACKWARD_WEIGHT
        ]
        for source in {message.source for message in received}:
            sent = [(message.kind, message.stage, message.micro_batch) for message in received if message.source == source]
            from_source = set(sent)
            needed = [key for key in inputs if key in from_source]
            for next_sent, next_needed in zip(sent, needed, strict=True):
                if next_sent != next_needed:
                    raise ScheduleError(
                        f"order of messages: rank {rank} waits for {Action(*next_needed)}'s input, "
                        f"but rank {source} sends {Action(*next_sent)}'s before it"
                    )


def _peak_activations(order: tuple[Action, ...]) -> int:
    if all(action.kind is ActionKind.FORWARD for action in order):
        return min(1, len(order))
    live = 0
    peak = 0
    for action in order:
        if action.kind is ActionKind.FORWARD:
            live += 1
            peak = max(peak, live)
        elif action.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT):
            live -= 1
    return peak
