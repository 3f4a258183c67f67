"""Interleaved schedules: each rank has several stages, `ranks` apart, and turns to the next after a round of micro-batches."""

from itertools import accumulate, pairwise

from megagpt.pipeline.alternate import alternate, late_weights
from megagpt.pipeline.plan import Action, Kind, Plan, assemble, in_turn


def loop(ranks: int, chunks: int) -> tuple[int, ...]:
    """The rank of each stage: stage s on rank s % ranks."""
    return tuple(stage % ranks for stage in range(ranks * chunks))


def interleaved_1f1b(ranks: int, micro_batches: int, chunks: int) -> Plan:
    """1F1B with `chunks` stages on a rank (Narayanan et al., arXiv 2104.04473, section 2.2): its bubble divided by them."""
    orders = [_turns(rank, ranks, micro_batches, chunks, per_hop=2) for rank in range(ranks)]
    return assemble(orders, loop(ranks, chunks), micro_batches)


def interleaved_zero_bubble(ranks: int, micro_batches: int, chunks: int) -> Plan:
    """`interleaved_1f1b` whose weight gradients wait, rank r's for r more backwards (after Qi et al., arXiv 2401.10241).

    A backward for the input is as short as a forward, so half as many forwards start ahead of it.
    """
    orders = [late_weights(_turns(rank, ranks, micro_batches, chunks, per_hop=1), delay=rank) for rank in range(ranks)]
    return assemble(orders, loop(ranks, chunks), micro_batches)


def _turns(rank: int, ranks: int, micro_batches: int, chunks: int, per_hop: int) -> list[Action]:
    """A rank's list; it starts with `per_hop` more forwards than the next rank."""
    rounds = _rounds(ranks, micro_batches)
    stages = range(rank, ranks * chunks, ranks)
    forwards = [action for batch in rounds for stage in stages for action in in_turn(Kind.F, stage, batch)]
    backwards = [action for batch in rounds for stage in reversed(stages) for action in in_turn(Kind.B, stage, batch)]
    ahead = (chunks - 1) * len(rounds[0]) + per_hop * (ranks - 1 - rank)
    return alternate(forwards, backwards, ahead)


def _rounds(ranks: int, micro_batches: int) -> list[range]:
    """The micro-batches that a rank computes on one chunk before it turns to the next: `ranks` or a few more.

    Where there are fewer than `ranks` it is one short round; what does not divide evenly goes to the first rounds.
    """
    count = max(1, micro_batches // ranks)
    size, more = divmod(micro_batches, count)
    sizes = [size + (number < more) for number in range(count)]
    return [range(start, stop) for start, stop in pairwise([0, *accumulate(sizes)])]
