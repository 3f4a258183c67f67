"""What 1F1B and its kin share: a list made of forwards, of backwards, and of how far the former are ahead."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from megagpt.pipeline.plan import Action, Kind


def alternate(forwards: Sequence[Action], backwards: Sequence[Action], ahead: int) -> list[Action]:
    """`ahead` forwards, then one forward and one backward in turn, then the backwards that are left.

    Both sequences have the same length; where they are shorter than `ahead`, all forwards come first.
    """
    ahead = min(ahead, len(forwards))
    order = list(forwards[:ahead])
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        order += [forward, backward]
    return order + list(backwards[len(forwards) - ahead :])


def late_weights(order: Sequence[Action], delay: int) -> list[Action]:
    """`order` with every B as an I, and its W run once `delay` more I have come, or at the end."""
    split: list[Action] = []
    waiting: deque[Action] = deque()
    for action in order:
        if action.kind is not Kind.B:
            split.append(action)
            continue
        split.append(replace(action, kind=Kind.I))
        waiting.append(replace(action, kind=Kind.W))
        if len(waiting) > delay:
            split.append(waiting.popleft())
    return split + list(waiting)
