"""ZB-V: each rank has two stages in a V, so the first and the last stage are both on rank 0."""

from collections import Counter
from collections.abc import Sequence

from megagpt.schedules.common import v_placement
from megagpt.schedules.plan import Action, ActionKind, Plan, build_plan


def zbv(ranks: int, micro_batches: int) -> Plan:
    """ZB-V (Qi et al., arXiv 2401.10241, section 6): 1F1B's memory, and no bubble if F, I and W take the same time.

    A rank has at most `2 * ranks` half micro-batches in flight (one stage of a micro-batch is a half). The order is built
    for at least 2 * ranks - 1 micro-batches; with fewer, the actions of the missing ones are left out.
    """
    orders = [_zbv_order(rank, ranks, max(micro_batches, 2 * ranks - 1)) for rank in range(ranks)]
    existing = [[action for action in order if action.micro_batch < micro_batches] for order in orders]
    return build_plan(existing, v_placement(ranks), micro_batches)


def _zbv_order(rank: int, ranks: int, micro_batches: int) -> list[Action]:
    """Return the action list of `rank`.

    In the lists below "F0" is the next forward of its first stage, "I1" the next input backward of its second stage.
    """
    fill = ["F0"] * (2 * (ranks - rank) - 1) + ["F1", "F0"] * rank + ["F1", "I1", "W1"] * (ranks - rank)
    last_forwards = ranks - 1 - rank
    steady = ["F0", "I0", "W0", "F1", "I1", "W1"] * (micro_batches - ranks - last_forwards)
    steady += ["I0", "W0", "F1", "I1", "W1"] * last_forwards
    drain = ["I0", "I1"] * rank + ["I0", "W0"] * (ranks - rank) + ["W1"] * rank + ["W0"] * rank
    return _number_micro_batches(fill + steady + drain, rank, ranks)


def _number_micro_batches(steps: Sequence[str], rank: int, ranks: int) -> list[Action]:
    """Convert the steps to actions: equal steps take micro-batches 0, 1, 2, ... in turn."""
    stages = {"0": rank, "1": 2 * ranks - 1 - rank}
    count: Counter[str] = Counter()
    order = []
    for step in steps:
        order.append(Action(ActionKind(step[0]), stages[step[1]], count[step]))
        count[step] += 1
    return order
