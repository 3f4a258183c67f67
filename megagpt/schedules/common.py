"""Helpers of the schedule files: stage placements, the 1F1B order, and delayed weight gradients."""

from collections import deque
from collections.abc import Sequence

from megagpt.schedules.plan import Action, ActionKind


def loop_placement(ranks: int, chunks: int = 1) -> tuple[int, ...]:
    """Return the rank of each stage: stage s is on rank s % ranks."""
    return tuple(stage % ranks for stage in range(ranks * chunks))


def v_placement(ranks: int, chunks: int = 2) -> tuple[int, ...]:
    """Return the rank of each stage: 0 ... ranks - 1, then back to 0, and so on for more than two chunks."""
    down = tuple(range(ranks))
    return tuple(rank for chunk in range(chunks) for rank in (down if chunk % 2 == 0 else reversed(down)))


def interleave_1f1b(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> list[Action]:
    """Return `warmup` forwards, then one forward and one backward in turn, then the remaining backwards.

    Both sequences have the same length. If they are shorter than `warmup`, all forwards come first.
    """
    warmup = min(warmup, len(forwards))
    order = list(forwards[:warmup])
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += [forward, backward]
    return order + list(backwards[len(forwards) - warmup :])


def delay_weight_gradients(order: Sequence[Action], delay: int) -> list[Action]:
    """Return `order` with each full backward split into its halves.

    The weight half runs after `delay` more input halves, or at the end of the list.
    """
    split: list[Action] = []
    pending: deque[Action] = deque()
    for action in order:
        if action.kind is not ActionKind.BACKWARD:
            split.append(action)
            continue
        split.append(Action(ActionKind.BACKWARD_INPUT, action.stage, action.micro_batch))
        pending.append(Action(ActionKind.BACKWARD_WEIGHT, action.stage, action.micro_batch))
        if len(pending) > delay:
            split.append(pending.popleft())
    return split + list(pending)
