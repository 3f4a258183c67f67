"""Learning rate and weight decay as pure functions of the step: a resumed run needs no state for them."""

import math

from megagpt.config.schema import LRScheduleConfig, OptimizerConfig


def learning_rate(step: int, total_steps: int, peak: float, config: LRScheduleConfig) -> float:
    """Return the learning rate of optimizer step `step` (counted from 0) in a run of `total_steps`.

    Warm-up: linear from `peak / warmup_steps` in the first step to `peak` in its last step. After it `min_lr` is the lower
    limit. cosine (Loshchilov and Hutter, arXiv 1608.03983) and linear fall from step `warmup_steps`, still at the peak, to
    `decay_steps`; inverse-sqrt falls as in Vaswani et al. (arXiv 1706.03762); warmup-stable-decay (Hu et al.,
    arXiv 2404.06395) stays at the peak and falls linearly over the last `decay_steps` steps. `min_lr` would be reached in
    the step after the last one, so no step of a full run has a learning rate of zero.
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


def weight_decay(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Return the weight decay of optimizer step `step` (counted from 0) in a run of `total_steps`.

    `final_weight_decay` would be reached in the step after the last one.
    """
    if config.final_weight_decay is None:
        return config.weight_decay
    share = _progress(step, 0, total_steps)
    if config.weight_decay_schedule == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return config.weight_decay + (config.final_weight_decay - config.weight_decay) * share


def _progress(step: int, start: int, end: int) -> float:
    """Return the progress of `step` from `start` to `end`, 0 to 1."""
    if step >= end:
        return 1.0
    return max(0.0, (step - start) / (end - start))


def _between(peak: float, floor: float, share: float) -> float:
    return floor + (peak - floor) * share
