"""The V: each rank has two stages, and the model goes down the ranks and up again, so that it ends where it began."""

from collections import Counter
from collections.abc import Sequence

from megagpt.pipeline.plan import Action, Kind, Plan, assemble

CHUNKS_OF_A_V = 2


def v_placement(ranks: int) -> tuple[int, ...]:
    """The rank of each stage: 0 ... ranks - 1, then back to 0."""
    return (*range(ranks), *reversed(range(ranks)))


def zbv(ranks: int, micro_batches: int) -> Plan:
    """ZB-V (Qi et al., arXiv 2401.10241, section 6): as much memory as 1F1B, no bubble where F, I and W take the same time.

    A rank never holds more than `2 * ranks` halves of a micro-batch. The order is made for 2 * ranks - 1 micro-batches or
    more; with fewer, those that do not exist are left out.
    """
    orders = [_zbv_order(rank, ranks, max(micro_batches, 2 * ranks - 1)) for rank in range(ranks)]
    real = [[action for action in order if action.micro_batch < micro_batches] for order in orders]
    return assemble(real, v_placement(ranks), micro_batches)


def _zbv_order(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """A rank's list. "F0" stands for the next forward of its first stage, "I1" for the next input backward of its second."""
    fill = ["F0"] * (2 * (ranks - rank) - 1) + ["F1", "F0"] * rank + ["F1", "I1", "W1"] * (ranks - rank)
    last_forwards = ranks - 1 - rank
    steady = ["F0", "I0", "W0", "F1", "I1", "W1"] * (micro_batches - ranks - last_forwards)
    steady += ["I0", "W0", "F1", "I1", "W1"] * last_forwards
    drain = ["I0", "I1"] * rank + ["I0", "W0"] * (ranks - rank) + ["W1"] * rank + ["W0"] * rank
    return _numbered(fill + steady + drain, rank, ranks)


def _numbered(steps: Sequence[str], rank: int, ranks: int) -> list[Action]:
    stages = {"0": rank, "1": 2 * ranks - 1 - rank}
    done: Counter[str] = Counter()
    order = []
    for step in steps:
        order.append(Action(Kind(step[0]), stages[step[1]], done[step]))
        done[step] += 1
    return order
