"""All schedules by the name that `parallel.schedule` gives them. A new schedule is a build function and one line here."""

from collections.abc import Callable
from dataclasses import dataclass

from megagpt.schedules.common import loop_placement, v_placement
from megagpt.schedules.interleaved import interleaved_1f1b, interleaved_zero_bubble
from megagpt.schedules.one_f_one_b import gpipe, one_f_one_b, zb_h1
from megagpt.schedules.plan import Plan
from megagpt.schedules.v_half_v_min import v_half, v_min
from megagpt.schedules.zbv import zbv


@dataclass(frozen=True)
class ScheduleSpec:
    """How to build a schedule, and which stages its ranks have."""

    build: Callable[..., Plan]
    """(ranks, micro-batches) -> plan; (ranks, micro-batches, chunks per rank) -> plan if interleaved."""
    placement: Callable[[int, int], tuple[int, ...]]
    """(ranks, chunks per rank) -> the rank of each stage."""
    fixed_chunks: int | None = 1
    """Number of chunks of layers per rank; None if interleaved: the user chooses 2 or more virtual stages."""

    @property
    def interleaved(self) -> bool:
        """Whether the number of chunks per rank is the user's choice."""
        return self.fixed_chunks is None

    @property
    def valid_virtual_stages(self) -> str:
        """Valid numbers of virtual stages, for messages. 1 means the schedule's own number of chunks."""
        if self.fixed_chunks is None:
            return "2 or more"
        return "1" if self.fixed_chunks == 1 else f"1 or {self.fixed_chunks}"

    def accepts(self, virtual_stages: int) -> bool:
        """Return whether the schedule can have this number of virtual stages."""
        if self.fixed_chunks is None:
            return virtual_stages >= 2
        return virtual_stages in (1, self.fixed_chunks)


SCHEDULES: dict[str, ScheduleSpec] = {
    "1f1b": ScheduleSpec(one_f_one_b, loop_placement),
    "gpipe": ScheduleSpec(gpipe, loop_placement),
    "interleaved_1f1b": ScheduleSpec(interleaved_1f1b, loop_placement, fixed_chunks=None),
    "interleaved_zero_bubble": ScheduleSpec(interleaved_zero_bubble, loop_placement, fixed_chunks=None),
    "zb_h1": ScheduleSpec(zb_h1, loop_placement),
    "zbv": ScheduleSpec(zbv, v_placement, fixed_chunks=2),
    "v_half": ScheduleSpec(v_half, v_placement, fixed_chunks=2),
    "v_min": ScheduleSpec(v_min, v_placement, fixed_chunks=2),
}


def make_plan(name: str, ranks: int, micro_batches: int, virtual_stages: int = 1) -> Plan:
    """Return the plan of schedule `name` for any number of ranks and of micro-batches.

    Raises ValueError if a number is not positive, or if the schedule cannot have `virtual_stages`.
    """
    chunks = chunks_per_rank(name, virtual_stages)
    if ranks < 1 or micro_batches < 1:
        raise ValueError(f"{name}: {ranks} ranks and {micro_batches} micro-batches; at least one of each is needed")
    schedule = SCHEDULES[name]
    if schedule.interleaved:
        return schedule.build(ranks, micro_batches, chunks)
    return schedule.build(ranks, micro_batches)


def placement(name: str, ranks: int, virtual_stages: int = 1) -> tuple[int, ...]:
    """Return the rank of each stage, as in the plans of schedule `name`.

    Raises ValueError if the schedule cannot have `virtual_stages`.
    """
    return SCHEDULES[name].placement(ranks, chunks_per_rank(name, virtual_stages))


def chunks_per_rank(name: str, virtual_stages: int = 1) -> int:
    """Return the number of stages on each rank. `virtual_stages` 1 means the schedule's own number.

    Raises ValueError if the schedule cannot have `virtual_stages`.
    """
    schedule = SCHEDULES[name]
    if not schedule.accepts(virtual_stages):
        others = " and ".join(other for other, spec in SCHEDULES.items() if spec.interleaved and not schedule.interleaved)
        hint = f"; {others} can have more" if others else ""
        raise ValueError(f"{name}: virtual_stages must be {schedule.valid_virtual_stages}, not {virtual_stages}{hint}")
    return virtual_stages if schedule.fixed_chunks is None else schedule.fixed_chunks


def splits_backward(schedule: str) -> bool:
    """Return whether a schedule computes gradients of inputs and of weights at different times."""
    return schedule not in ("1f1b", "gpipe", "interleaved_1f1b")
