"""Metrics as lines for people: progress, loss, speed, remaining time."""

import math
import re
import sys
from datetime import datetime, timedelta
from typing import TextIO

from megagpt.training.loggers.base import MetricsRecord

EVALUATION = re.compile(r"(eval|test)(_.+)?_loss")
"""Name of the loss in a record of an evaluation."""


class ConsoleLogger:
    """Prints one line per record."""

    def __init__(self, total_steps: int, device_type: str = "cpu", stream: TextIO | None = None) -> None:
        """`device_type`: torch's name; the memory of a CPU process is not printed.

        `stream`: where to print; by default `sys.stdout` at the time of each record.
        """
        self._total = total_steps
        self._device_type = device_type
        self._stream = stream

    def step(self, record: MetricsRecord) -> None:
        """Print `record`, with the time of day at this machine."""
        clock = datetime.fromisoformat(record["time"]).astimezone().strftime("%H:%M:%S")
        head = f"{clock} step {record['step']:>{len(str(self._total))}}/{self._total}"
        for parts in self._lines(record):
            print(" | ".join([head, *parts]), file=self._stream or sys.stdout, flush=True)

    def rewind(self, step: int) -> None:
        """Do nothing: printed lines stay."""

    def close(self) -> None:
        """Do nothing: the stream belongs to the process."""

    def _lines(self, record: MetricsRecord) -> list[list[str]]:
        """Return the parts of each line."""
        if "samples" in record:
            return [[f"sample {sample['prompt']!r}", repr(sample["text"])] for sample in record["samples"]]
        split = next((name.removesuffix("_loss") for name in record if EVALUATION.fullmatch(name)), None)
        return [self._training_parts(record) if split is None else _evaluation_parts(record, split)]

    def _training_parts(self, record: MetricsRecord) -> list[str]:
        seconds_left = (self._total - record["step"]) * record["step_seconds"]
        parts = [
            f"loss {record['loss']:.4f}",
            *_reward_parts(record),
            f"lr {record['learning_rate']:.2e}",
            f"grad norm {record['grad_norm']:.3f}",
            _speed(record),
            f"{record['step_seconds']:.3f} s/step",
        ]
        if "mfu" in record:
            parts.append(f"{record['tflops_per_device']:.0f} TFLOP/s per device, MFU {record['mfu']:.1%}")
        if self._device_type != "cpu" and record.get("peak_memory_gib") is not None:
            parts.append(f"{record['peak_memory_gib']:.1f} GiB")
        parts.append(f"{timedelta(seconds=round(seconds_left))} left" if math.isfinite(seconds_left) else "? left")
        return parts


def _speed(record: MetricsRecord) -> str:
    """Return the tokens per second, also of one device if there are several."""
    total, per_device = record["tokens_per_second"], record["tokens_per_second_per_device"]
    return f"{total:,.0f} tokens/s" + (f" ({per_device:,.0f}/device)" if per_device < total else "")


def _evaluation_parts(record: MetricsRecord, split: str) -> list[str]:
    parts = [f"{split.replace('_', ' ', 1)} loss {record[f'{split}_loss']:.4f}"]
    if f"{split}_perplexity" in record:
        parts.append(f"perplexity {record[f'{split}_perplexity']:.2f}")
    if f"{split}_accuracy" in record:
        parts.append(f"accuracy {record[f'{split}_accuracy']:.1%}")
    return parts + _reward_parts(record, f"{split}_")


def _reward_parts(record: MetricsRecord, prefix: str = "") -> list[str]:
    """Return the metrics of preference tuning, if the record has them."""
    if f"{prefix}reward_margin" not in record:
        return []
    return [
        f"reward margin {record[f'{prefix}reward_margin']:.3f}",
        f"reward accuracy {record[f'{prefix}reward_accuracy']:.1%}",
    ]
