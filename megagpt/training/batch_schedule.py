"""The size of each step's global batch, as a pure function of the consumed samples: resuming needs no state for it.

With a ramp (Megatron's rampup-batch-size) the size grows from `start` to `global_batch_size` by `increment`; each size
below the last is used for an equal share of `samples`. Does not import torch.
"""

from collections.abc import Iterator, Sequence

from megagpt.config.schema import TrainingConfig

SampleRange = tuple[int, int]
"""Samples [first, end)."""


def batch_size(consumed_samples: int, training: TrainingConfig) -> int:
    """Return the sequences in the step that starts at sample `consumed_samples`."""
    ramp = training.batch_ramp
    if ramp.start is None or consumed_samples >= ramp.samples:
        return training.global_batch_size
    return ramp.start + ramp.increment * (consumed_samples * _increments(training) // ramp.samples)


def batches_from(
    consumed_samples: int, training: TrainingConfig, skipped_ranges: Sequence[SampleRange] = ()
) -> Iterator[tuple[int, int]]:
    """Yield first sample and size of every following global batch, without end.

    A batch that would overlap a range in `skipped_ranges` starts at the end of that range instead.
    """
    first = consumed_samples
    while True:
        size = batch_size(first, training)
        ends = [end for start, end in skipped_ranges if first < end and start < first + size]
        if ends:
            first = max(ends)
            continue
        yield first, size
        first += size


def steps_between(consumed_samples: int, target: int, training: TrainingConfig) -> tuple[int, int]:
    """Return the number of steps from `consumed_samples` until `target` samples are consumed, and the sample they end at.

    The last step may end beyond `target`.
    """
    steps = 0
    while consumed_samples < target:  # once per batch size
        size = batch_size(consumed_samples, training)
        end = min(_end_of_size(consumed_samples, training) or target, target)
        more = -(-(end - consumed_samples) // size)
        steps += more
        consumed_samples += more * size
    return steps, consumed_samples


def trained_samples(consumed_samples: int, skipped_ranges: Sequence[SampleRange]) -> int:
    """Return the samples before `consumed_samples` that are in no skipped range."""
    return consumed_samples - sum(max(0, min(end, consumed_samples) - start) for start, end in skipped_ranges)


def _increments(training: TrainingConfig) -> int:
    ramp = training.batch_ramp
    return (training.global_batch_size - (ramp.start or 0)) // ramp.increment


def _end_of_size(consumed_samples: int, training: TrainingConfig) -> int | None:
    """Return the first sample at which a step has another size; None if the size is final."""
    ramp = training.batch_ramp
    if ramp.start is None or consumed_samples >= ramp.samples:
        return None
    increments = _increments(training)
    done = consumed_samples * increments // ramp.samples
    return -(-(done + 1) * ramp.samples // increments)
