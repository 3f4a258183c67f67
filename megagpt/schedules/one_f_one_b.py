"""Schedules with one stage on each rank: 1F1B, GPipe and ZB-H1."""

from megagpt.schedules.common import delay_weight_gradients, interleave_1f1b, loop_placement
from megagpt.schedules.plan import Action, ActionKind, Plan, actions_for, build_plan


def one_f_one_b(ranks: int, micro_batches: int) -> Plan:
    """1F1B: one forward and one backward in turn (PipeDream-flush; Narayanan et al., arXiv 2104.04473, section 2.2.1).

    Rank r starts with as many forwards as there are stages after it, so it has at most `ranks - r` micro-batches in flight.
    """
    orders = [_order_1f1b(rank, ranks, micro_batches) for rank in range(ranks)]
    return build_plan(orders, loop_placement(ranks), micro_batches)


def gpipe(ranks: int, micro_batches: int) -> Plan:
    """GPipe: all forwards, then all backwards (Huang et al., arXiv 1811.06965). All micro-batches are in flight at once."""
    every = range(micro_batches)
    orders = [
        actions_for(ActionKind.FORWARD, stage, every) + actions_for(ActionKind.BACKWARD, stage, every) for stage in range(ranks)
    ]
    return build_plan(orders, loop_placement(ranks), micro_batches)


def zb_h1(ranks: int, micro_batches: int) -> Plan:
    """ZB-H1: 1F1B with delayed weight gradients, which fill the drain (Qi et al., arXiv 2401.10241, section 2.1).

    Rank r delays its weight gradients by r backwards, so every rank has at most `ranks` micro-batches in flight: as many
    as 1F1B's first rank, with a third of its bubble.
    """
    orders = [delay_weight_gradients(_order_1f1b(rank, ranks, micro_batches), delay=rank) for rank in range(ranks)]
    return build_plan(orders, loop_placement(ranks), micro_batches)


def _order_1f1b(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """Return the 1F1B action list of `rank`."""
    every = range(micro_batches)
    forwards = actions_for(ActionKind.FORWARD, rank, every)
    backwards = actions_for(ActionKind.BACKWARD, rank, every)
    return interleave_1f1b(forwards, backwards, warmup=ranks - 1 - rank)
