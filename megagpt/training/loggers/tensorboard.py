"""Metrics as event files of TensorBoard."""

from torch.utils.tensorboard import SummaryWriter

from megagpt.errors import ConfigError
from megagpt.training.loggers.base import MetricsRecord

GROUPS = ("eval", "test")
"""Prefixes of metrics that become groups of their own; all other metrics are in the group "train"."""


class TensorBoardLogger:
    """Writes all numbers of a record as scalars. The x axis is the optimizer step."""

    def __init__(self, folder: str, start_step: int = 0) -> None:
        """Add event files to `folder`; TensorBoard ignores the events after `start_step` in its earlier files.

        Raises ConfigError if the folder cannot be written.
        """
        self._folder = folder
        try:
            self._writer = self._open(start_step)
        except OSError as error:
            raise ConfigError(f"logging.tensorboard.dir: {folder}: cannot be written: {error.strerror}") from None

    def step(self, record: MetricsRecord) -> None:
        """Write the numbers of `record`; they are in the file on return."""
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(tag(name), value, record["step"])
        self._writer.flush()

    def rewind(self, step: int) -> None:
        """Start a file that lets TensorBoard ignore the events after `step` in the earlier ones."""
        self._writer.close()
        self._writer = self._open(step)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _open(self, step: int) -> SummaryWriter:
        return SummaryWriter(self._folder, purge_step=step + 1)


def tag(name: str) -> str:
    """Return the name of a metric with its group: train/loss for loss, eval/loss for eval_loss."""
    prefix, _, rest = name.partition("_")
    return f"{prefix}/{rest}" if prefix in GROUPS else f"train/{name}"
