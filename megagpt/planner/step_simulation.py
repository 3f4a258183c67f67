"""Time and peak memory of a step by simulating its schedule; long steps follow from shorter ones. Does not import torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megagpt.schedules.plan import Action, ActionKind, Plan
from megagpt.schedules.registry import SCHEDULES, make_plan
from megagpt.schedules.simulate import Cost, finish_times

ROUNDING = 1 + 1e-9
"""Tolerance for sums of the same times in another order."""
FILL = 4
"""Micro-batches, in multiples of the ranks, after which a step is expected to repeat itself."""


class Held(NamedTuple):
    """What a rank keeps of one micro-batch on one stage, in any unit."""

    saved: float
    """From its forward to its (input) backward."""
    deferred: float
    """From its input backward to its weight backward, if the schedule has both."""


UNIT = Held(1.0, 1.0)


@dataclass(frozen=True)
class StepSimulation:
    """One step of all pipeline ranks."""

    finish: tuple[float, ...]
    """When each rank ends its last action, in the unit of the costs."""
    peaks: tuple[float, ...]
    """Largest sum over the (stage, micro-batch) pairs in flight, for each rank."""
    last_stages: tuple[int, ...]
    """The stage that each rank ends with."""

    @property
    def makespan(self) -> float:
        """Time of the step."""
        return max(self.finish)


def simulate_step(
    name: str,
    virtual_stages: int,
    ranks: int,
    micro_batches: int,
    cost: Cost,
    transfer: float,
    held: Sequence[Held] | None = None,
) -> StepSimulation:
    """Simulate one schedule. `cost` must not depend on the micro-batch.

    `held`: what each stage keeps of a micro-batch, for the peaks; 1 if absent.

    With many micro-batches a step repeats itself: `ranks` more of them add a constant time. So the shortest steps that show
    this, with the same remainder of micro-batches, are simulated, and the full step follows from them.
    """

    def measure(count: int) -> StepSimulation:
        plan = make_plan(name, ranks, count, virtual_stages)
        return measure_plan(plan, cost, transfer, held)

    remainder = micro_batches % ranks
    # The rounds of interleaved schedules share the remainder, one micro-batch each.
    rounds = FILL + remainder if SCHEDULES[name].interleaved else FILL
    while (rounds + 3) * ranks + remainder < micro_batches:
        steps = [measure((rounds + more) * ranks + remainder) for more in range(3)]
        if _repeats(steps, lambda step: step.finish) and _repeats(steps, lambda step: step.peaks):
            periods = (micro_batches - remainder) // ranks - rounds - 2
            return StepSimulation(
                _continued(steps, lambda step: step.finish, periods),
                _continued(steps, lambda step: step.peaks, periods),
                steps[2].last_stages,
            )
        rounds *= 2
    return measure(micro_batches)


def peaks_in_flight(name: str, virtual_stages: int, ranks: int, micro_batches: int, held: Sequence[Held]) -> tuple[float, ...]:
    """Return the largest sum in flight on each rank; of long steps it follows from two shorter ones."""
    remainder = micro_batches % ranks
    rounds = FILL + remainder % FILL

    def measure(count: int) -> tuple[float, ...]:
        return tuple(peak_held(order, held) for order in make_plan(name, ranks, count, virtual_stages).actions)

    if (rounds + 2) * ranks + remainder >= micro_batches:
        return measure(micro_batches)
    first, second = (measure((rounds + more) * ranks + remainder) for more in range(2))
    periods = (micro_batches - remainder) // ranks - rounds - 1
    return tuple(after + periods * (after - before) for before, after in zip(first, second, strict=True))


def measure_plan(plan: Plan, cost: Cost, transfer: float, held: Sequence[Held] | None = None) -> StepSimulation:
    """Simulate all micro-batches of a plan."""
    held = held or [UNIT] * plan.n_stages
    peaks = tuple(peak_held(order, held) for order in plan.actions)
    return StepSimulation(tuple(finish_times(plan, cost, transfer)), peaks, tuple(order[-1].stage for order in plan.actions))


def peak_held(actions: Sequence[Action], held: Sequence[Held]) -> float:
    """Return the largest sum of what is held over a rank's actions."""
    live = peak = 0.0
    for action in actions:
        saved, deferred = held[action.stage]
        if action.kind is ActionKind.FORWARD:
            live += saved
        elif action.kind is ActionKind.BACKWARD:
            live -= saved
        elif action.kind is ActionKind.BACKWARD_INPUT:
            live += deferred - saved
        else:
            live -= deferred
        peak = max(peak, live)
    return peak


Values = Callable[[StepSimulation], tuple[float, ...]]


def _repeats(steps: Sequence[StepSimulation], values: Values) -> bool:
    """Return whether the values of three steps grow by equal differences, but for rounding."""
    return all(
        abs((third - second) - (second - first)) <= (ROUNDING - 1) * third
        for first, second, third in zip(*map(values, steps), strict=True)
    )


def _continued(steps: Sequence[StepSimulation], values: Values, periods: int) -> tuple[float, ...]:
    return tuple(third + periods * (third - second) for second, third in zip(values(steps[1]), values(steps[2]), strict=True))
