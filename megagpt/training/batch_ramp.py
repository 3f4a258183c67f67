"""The size of each step's global batch, as a pure function of the samples already read: resuming needs no state for it.

With a ramp (Megatron's rampup-batch-size) the size goes from `start` to `global_batch_size` by `increment`, and each
size below the last holds for an equal part of `samples`. Needs no torch.
"""

from collections.abc import Iterator, Sequence

from megagpt.config.schema import TrainingConfig


def batch_size(samples: int, training: TrainingConfig) -> int:
    """Sequences in the step that begins at sample `samples`."""
    ramp = training.batch_ramp
    if ramp.start is None or samples >= ramp.samples:
        return training.global_batch_size
    return ramp.start + ramp.increment * (samples * _increments(training) // ramp.samples)


def batches_from(
    samples: int, training: TrainingConfig, passed_over: Sequence[tuple[int, int]] = ()
) -> Iterator[tuple[int, int]]:
    """First sample and size of the global batches from sample `samples` on, without end.

    A batch that would read of a range [first, end) in `passed_over` begins at its end instead.
    """
    while True:
        size = batch_size(samples, training)
        beyond = [end for first, end in passed_over if samples < end and first < samples + size]
        if beyond:
            samples = max(beyond)
            continue
        yield samples, size
        samples += size


def steps_between(samples: int, wanted: int, training: TrainingConfig) -> tuple[int, int]:
    """Steps from sample `samples` until `wanted` are read, and where the last of them ends: at `wanted` or beyond."""
    steps = 0
    while samples < wanted:  # once for each size
        size, until = batch_size(samples, training), min(_end_of_size(samples, training) or wanted, wanted)
        more = -(-(until - samples) // size)
        steps, samples = steps + more, samples + more * size
    return steps, samples


def _increments(training: TrainingConfig) -> int:
    ramp = training.batch_ramp
    return (training.global_batch_size - (ramp.start or 0)) // ramp.increment


def _end_of_size(samples: int, training: TrainingConfig) -> int | None:
    """The first sample at which a step has another size than at `samples`; None where it is the last size."""
    ramp = training.batch_ramp
    if ramp.start is None or samples >= ramp.samples:
        return None
    increments = _increments(training)
    done = samples * increments // ramp.samples
    return -(-(done + 1) * ramp.samples // increments)
