"""Schedules in which each rank has one stage: 1F1B, GPipe, ZB-H1."""

from megagpt.pipeline.alternate import alternate, late_weights
from megagpt.pipeline.plan import Action, Kind, Plan, assemble, in_turn


def one_f_one_b(ranks: int, micro_batches: int) -> Plan:
    """One forward, one backward in turn (PipeDream-flush; Narayanan et al., arXiv 2104.04473, section 2.2.1).

    Rank r starts with as many forwards as there are stages after it, so it never holds the activations of
    more than `ranks - r` micro-batches.
    """
    return assemble([_turns(rank, ranks, micro_batches) for rank in range(ranks)], range(ranks), micro_batches)


def gpipe(ranks: int, micro_batches: int) -> Plan:
    """All forwards, then all backwards (Huang et al., arXiv 1811.06965): every activation is live at the turn."""
    every = range(micro_batches)
    orders = [in_turn(Kind.F, stage, every) + in_turn(Kind.B, stage, every) for stage in range(ranks)]
    return assemble(orders, range(ranks), micro_batches)


def zb_h1(ranks: int, micro_batches: int) -> Plan:
    """1F1B whose weight gradients wait and fill the drain (Qi et al., arXiv 2401.10241, section 2.1).

    Rank r keeps r weight gradients back, so every rank holds at most `ranks` micro-batches: as much as 1F1B's first
    rank, for a third of its bubble.
    """
    orders = [late_weights(_turns(rank, ranks, micro_batches), delay=rank) for rank in range(ranks)]
    return assemble(orders, range(ranks), micro_batches)


def _turns(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    every = range(micro_batches)
    return alternate(in_turn(Kind.F, rank, every), in_turn(Kind.B, rank, every), ahead=ranks - 1 - rank)
