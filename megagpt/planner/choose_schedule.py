"""Simulate every schedule and pick the fastest that fits in memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megagpt.planner.schedule_costs import CostModel
from megagpt.planner.step_simulation import ROUNDING, simulate_step
from megagpt.schedules.registry import SCHEDULES, chunks_per_rank

MAX_CHUNKS = 4
"""Largest number of chunks per rank that is tried: each further chunk adds messages and saves less of the bubble."""


@dataclass(frozen=True)
class Choice:
    """A schedule and its simulated time and memory."""

    name: str
    virtual_stages: int
    """Value of `parallel.virtual_stages`: 1 except for interleaved schedules."""
    n_stages: int
    makespan: float
    """Time of one step, in the unit of the costs."""
    in_flight: float
    """Peak number of micro-batches in flight on a rank; a micro-batch with live activations on 1 of 2 chunks counts half."""
    why: str = ""
    """One or two sentences for the user, with the numbers of the next best schedule."""

    def __str__(self) -> str:
        chunks = f" with {self.virtual_stages} virtual stages" if self.virtual_stages > 1 else ""
        return f"{self.name}{chunks} ({self.makespan:.4g} per step, {self.in_flight:.3g} micro-batches in flight)"


def best_plan(
    ranks: int,
    micro_batches: int,
    costs: CostModel,
    transfer: float = 0.0,
    max_in_flight: float | None = None,
    max_stages: int | None = None,
    report: Callable[[int, int], object] = lambda done, total: None,
) -> Choice:
    """Return the schedule with the shortest step; among equal ones, the least memory, then the fewest stages.

    `costs` must not depend on the micro-batch. `transfer`: travel time of a message. `max_in_flight`: number of in-flight
    micro-batches that fit in a rank's memory.
    `max_stages`: number of layers of the model; None for any number of stages. `report`: called after each schedule with
    the number of schedules that are done and of all.
    Raises ValueError if there are fewer layers than ranks, or if no schedule fits in memory (the message names the one
    that needs the least).
    """
    if max_stages is not None and max_stages < ranks:
        raise ValueError(f"{max_stages} layers cannot fill one stage on each of {ranks} ranks")
    candidates = list(_candidates(ranks, max_stages))
    choices = []
    for name, virtual_stages in candidates:
        choices.append(_simulate(name, virtual_stages, ranks, micro_batches, costs, transfer))
        report(len(choices), len(candidates))
    limit = float("inf") if max_in_flight is None else max_in_flight * ROUNDING
    fitting = [choice for choice in choices if choice.in_flight <= limit]
    if not fitting:
        smallest = min(choices, key=lambda choice: choice.in_flight)
        raise ValueError(f"no schedule has at most {max_in_flight:.3g} micro-batches in flight; the lowest is {smallest}")
    best, *others = _ranked(fitting)
    second = f"Next best: {others[0]}" if others else "No other schedule fits"
    too_large = [choice for choice in choices if choice.in_flight > limit and choice.makespan < best.makespan]
    faster = f"; faster, but above the limit of {max_in_flight:.3g}: {_ranked(too_large)[0]}" if too_large else ""
    return replace(best, why=f"{best} is the fastest of {len(fitting)} that fit. {second}{faster}.")


def _candidates(ranks: int, max_stages: int | None) -> Iterator[tuple[str, int]]:
    """Yield (name, virtual stages) of all schedules with at most `max_stages` stages."""
    for name, schedule in SCHEDULES.items():
        for virtual_stages in range(2, MAX_CHUNKS + 1) if schedule.interleaved else (1,):
            if max_stages is None or ranks * chunks_per_rank(name, virtual_stages) <= max_stages:
                yield name, virtual_stages


def _simulate(name: str, virtual_stages: int, ranks: int, micro_batches: int, costs: CostModel, transfer: float) -> Choice:
    """Simulate one schedule."""
    chunks = chunks_per_rank(name, virtual_stages)
    step = simulate_step(name, virtual_stages, ranks, micro_batches, costs(ranks * chunks), transfer)
    return Choice(name, virtual_stages, ranks * chunks, step.makespan, max(step.peaks) / chunks)


def _ranked(choices: list[Choice]) -> list[Choice]:
    """Return the choices, best first. Times that differ only by rounding are equal."""
    remaining = list(choices)
    ranked = []
    while remaining:
        shortest = min(choice.makespan for choice in remaining) * ROUNDING
        equal = [choice for choice in remaining if choice.makespan <= shortest]
        best = min(equal, key=lambda choice: (choice.in_flight, choice.n_stages))
        ranked.append(best)
        remaining.remove(best)
    return ranked
