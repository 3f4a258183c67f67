"""The learning rate as a pure function of the step, so that a resumed run needs no state for it."""

import math

from megagpt.config.schema import LRScheduleConfig


def learning_rate(step: int, total_steps: int, peak: float, config: LRScheduleConfig) -> float:
    """The rate of optimizer step `step` (counted from 0) in a run of `total_steps`.

    The warm-up rises from `peak / warmup_steps` in the first step to `peak` in its last; the floor `min_lr`
    holds from there on. Cosine (Loshchilov and Hutter, arXiv 1608.03983) and linear fall over the steps from
    `warmup_steps` to `decay_steps`, the first of them still at the peak; inverse-sqrt falls as in Vaswani et
    al. (arXiv 1706.03762); warmup-stable-decay (Hu et al., arXiv 2404.06395) stays at the peak and falls
    linearly over the last `decay_steps`. What would be the first step after the decay has `min_lr`, so no step
    of a whole run is spent at a rate of zero.
    """
    warmup, floor = config.warmup_steps, config.min_lr
    if step < warmup:
        return peak * (step + 1) / warmup
    match config.type:
        case "constant":
            return max(peak, floor)
        case "inverse-sqrt":
            return max(peak * math.sqrt(max(warmup, 1) / (step + 1)), floor)
        case "warmup-stable-decay":
            length = config.decay_steps or max(1, round(total_steps / 10))
            return _between(peak, floor, 1 - _progress(step, max(warmup, total_steps - length), total_steps))
        case "linear":
            return _between(peak, floor, 1 - _progress(step, warmup, config.decay_steps or total_steps))
        case "cosine":
            progress = _progress(step, warmup, config.decay_steps or total_steps)
            return _between(peak, floor, (1 + math.cos(math.pi * progress)) / 2)


def _progress(step: int, start: int, end: int) -> float:
    """How far `step` is on the way from `start` to `end`, 0 to 1."""
    if step >= end:
        return 1.0
    return max(0.0, (step - start) / (end - start))


def _between(peak: float, floor: float, share: float) -> float:
    return floor + (peak - floor) * share
