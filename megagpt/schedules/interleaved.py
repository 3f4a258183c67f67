"""Interleaved schedules: each rank has several stages, `ranks` apart, and changes stage after each round of micro-batches."""

from itertools import accumulate, pairwise

from megagpt.schedules.common import delay_weight_gradients, interleave_1f1b, loop_placement
from megagpt.schedules.plan import Action, ActionKind, Plan, actions_for, build_plan


def interleaved_1f1b(ranks: int, micro_batches: int, chunks: int) -> Plan:
    """1F1B with `chunks` stages on each rank: the bubble is divided by `chunks`.

    Source: Narayanan et al., arXiv 2104.04473, section 2.2.
    """
    orders = [_rank_order(rank, ranks, micro_batches, chunks, warmup_step=2) for rank in range(ranks)]
    return build_plan(orders, loop_placement(ranks, chunks), micro_batches)


def interleaved_zero_bubble(ranks: int, micro_batches: int, chunks: int) -> Plan:
    """`interleaved_1f1b` with delayed weight gradients: on rank r by r backwards (after Qi et al., arXiv 2401.10241).

    An input backward takes only as long as a forward, so the warm-up needs half as many forwards.
    """
    orders = []
    for rank in range(ranks):
        order = _rank_order(rank, ranks, micro_batches, chunks, warmup_step=1)
        orders.append(delay_weight_gradients(order, delay=rank))
    return build_plan(orders, loop_placement(ranks, chunks), micro_batches)


def _rank_order(rank: int, ranks: int, micro_batches: int, chunks: int, warmup_step: int) -> list[Action]:
    """Return the action list of `rank`. Its warm-up has `warmup_step` forwards more than the next rank's."""
    rounds = _rounds(ranks, micro_batches)
    stages = range(rank, ranks * chunks, ranks)
    forwards: list[Action] = []
    backwards: list[Action] = []
    for batch in rounds:
        for stage in stages:
            forwards += actions_for(ActionKind.FORWARD, stage, batch)
        for stage in reversed(stages):
            backwards += actions_for(ActionKind.BACKWARD, stage, batch)
    warmup = (chunks - 1) * len(rounds[0]) + warmup_step * (ranks - 1 - rank)
    return interleave_1f1b(forwards, backwards, warmup)


def _rounds(ranks: int, micro_batches: int) -> list[range]:
    """Return the micro-batches of each round: those that a rank computes on one chunk before it changes to the next.

    A round has `ranks` micro-batches or a few more; the first rounds get the remainder. Fewer micro-batches than ranks
    make one short round.
    """
    count = max(1, micro_batches // ranks)
    size, remainder = divmod(micro_batches, count)
    sizes = [size + (index < remainder) for index in range(count)]
    return [range(start, stop) for start, stop in pairwise([0, *accumulate(sizes)])]
