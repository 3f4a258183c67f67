"""Every schedule by the name that the config gives it. A new one is a new pure function and its line here."""

from collections.abc import Callable

from megagpt.config.schema import Schedule
from megagpt.pipeline.building_block import v_half, v_min
from megagpt.pipeline.interleaved import interleaved_1f1b, interleaved_zero_bubble, loop
from megagpt.pipeline.one_stage import gpipe, one_f_one_b, zb_h1
from megagpt.pipeline.plan import Plan
from megagpt.pipeline.v_shape import CHUNKS_OF_A_V, v_placement, zbv

ONE_STAGE: dict[Schedule, Callable[[int, int], Plan]] = {"1f1b": one_f_one_b, "gpipe": gpipe, "zb_h1": zb_h1}
V_SHAPED: dict[Schedule, Callable[[int, int], Plan]] = {"zbv": zbv, "v_half": v_half, "v_min": v_min}
INTERLEAVED: dict[Schedule, Callable[[int, int, int], Plan]] = {
    "interleaved_1f1b": interleaved_1f1b,
    "interleaved_zero_bubble": interleaved_zero_bubble,
}


def make_plan(name: Schedule, ranks: int, micro_batches: int, virtual_stages: int = 1) -> Plan:
    """The plan of the schedule that the config names `name`, for any number of ranks and of micro-batches.

    Raises ValueError for a number that is not positive and as `chunks_per_rank` does.
    """
    chunks = chunks_per_rank(name, virtual_stages)
    if ranks < 1 or micro_batches < 1:
        raise ValueError(f"{name}: {ranks} ranks and {micro_batches} micro-batches; at least one of each is needed")
    if name in INTERLEAVED:
        return INTERLEAVED[name](ranks, micro_batches, chunks)
    return (ONE_STAGE | V_SHAPED)[name](ranks, micro_batches)


def placement(name: Schedule, ranks: int, virtual_stages: int = 1) -> tuple[int, ...]:
    """The rank of each stage, as in the plans of this schedule. Raises ValueError as `chunks_per_rank` does."""
    chunks = chunks_per_rank(name, virtual_stages)
    return v_placement(ranks) if name in V_SHAPED else loop(ranks, chunks)


def chunks_per_rank(name: Schedule, virtual_stages: int = 1) -> int:
    """How many stages a rank has. Raises ValueError where the schedule cannot have `virtual_stages`; 1 is as good as unsaid."""
    if name in INTERLEAVED and virtual_stages < 2:
        raise ValueError(f"{name}: interleaves 2 or more stages on each rank, not {virtual_stages}")
    if name in INTERLEAVED:
        return virtual_stages
    chunks = CHUNKS_OF_A_V if name in V_SHAPED else 1
    if virtual_stages not in (1, chunks):
        has = "two stages" if name in V_SHAPED else "one stage"
        raise ValueError(f"{name}: has {has} on each rank, not {virtual_stages}; {' and '.join(INTERLEAVED)} may have more")
    return chunks
