"""Which schedule is best for given times and memory: all are played, the fastest that fits is taken."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from megagpt.config.schema import Schedule
from megagpt.pipeline.costs import CostModel
from megagpt.pipeline.plan import Plan
from megagpt.pipeline.schedule import INTERLEAVED, chunks_per_rank, make_plan
from megagpt.pipeline.simulate import simulate

MOST_CHUNKS = 4
"""Interleaving more than this on a rank is not tried: each chunk more means more messages for less and less bubble."""
_ROUNDING = 1 + 1e-9
"""Sums of the same times in another order still count as equal."""


@dataclass(frozen=True)
class Choice:
    """A schedule and how it goes."""

    name: Schedule
    virtual_stages: int
    """As the config has it: 1 but for interleaved schedules."""
    plan: Plan
    makespan: float
    """Of one step, in the unit of the costs."""
    peak: float
    """The most activations that a rank holds, in micro-batches through all of its layers."""
    why: str = ""
    """One or two sentences for the user, with the numbers of the next best."""

    def __str__(self) -> str:
        chunks = f" with {self.virtual_stages} virtual stages" if self.virtual_stages > 1 else ""
        return f"{self.name}{chunks} ({self.makespan:.4g} a step, {self.peak:.3g} micro-batches held)"


def best_plan(
    ranks: int,
    micro_batches: int,
    costs: CostModel,
    transfer: float = 0.0,
    most_live: float | None = None,
    most_stages: int | None = None,
) -> Choice:
    """The schedule of the shortest step; of equally short ones that which holds least, then that of the fewest stages.

    `transfer`: time a message is under way. `most_live`: what a rank may hold, in micro-batches through all of its
    layers. `most_stages`: the number of layers, where fewer than `MOST_CHUNKS` for each rank.
    Raises ValueError where there are fewer layers than ranks, or no schedule holds so little: with the one that holds least.
    """
    if most_stages is not None and most_stages < ranks:
        raise ValueError(f"{most_stages} layers do not make a stage for each of {ranks} ranks")
    played = [
        _played(name, virtual_stages, ranks, micro_batches, costs, transfer)
        for name, virtual_stages in _candidates(ranks, most_stages)
    ]
    limit = float("inf") if most_live is None else most_live * _ROUNDING
    fitting = [choice for choice in played if choice.peak <= limit]
    if not fitting:
        least = min(played, key=lambda choice: choice.peak)
        raise ValueError(f"no schedule holds at most {most_live:.3g} micro-batches; the least: {least}")
    best, *others = _ranked(fitting)
    second = f"Next best: {others[0]}" if others else "No other fits"
    too_large = [choice for choice in played if choice.peak > limit and choice.makespan < best.makespan]
    faster = f"; faster, but above the {most_live:.3g} that fit: {_ranked(too_large)[0]}" if too_large else ""
    return replace(best, why=f"{best} is the fastest of {len(fitting)} that fit. {second}{faster}.")


def _candidates(ranks: int, most_stages: int | None) -> Iterator[tuple[Schedule, int]]:
    """Names, and virtual stages for those that may have several, whose stages are not more than `most_stages`."""
    for name in get_args(Schedule):
        for virtual_stages in range(2, MOST_CHUNKS + 1) if name in INTERLEAVED else (1,):
            if most_stages is None or ranks * chunks_per_rank(name, virtual_stages) <= most_stages:
                yield name, virtual_stages


def _played(name: Schedule, virtual_stages: int, ranks: int, micro_batches: int, costs: CostModel, transfer: float) -> Choice:
    plan = make_plan(name, ranks, micro_batches, virtual_stages)
    played = simulate(plan, costs(plan.n_stages), transfer, in_order=False)
    return Choice(name, virtual_stages, plan, played.makespan, max(played.peak_live) * ranks / plan.n_stages)


def _ranked(choices: list[Choice]) -> list[Choice]:
    """Best first. Times that differ by rounding alone are equal."""
    left, ranked = list(choices), []
    while left:
        shortest = min(choice.makespan for choice in left) * _ROUNDING
        equal = [choice for choice in left if choice.makespan <= shortest]
        ranked.append(min(equal, key=lambda choice: (choice.peak, choice.plan.n_stages)))
        left.remove(ranked[-1])
    return ranked
