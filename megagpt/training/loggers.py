"""Where rank 0 reports: a file of JSON lines, the console, Weights & Biases.

A training record has step, loss, learning_rate, grad_norm, tokens, tokens_per_second, step_seconds and data_wait;
an evaluation record has step, eval_loss and eval_perplexity, test_... after the last step. `step` counts the optimizer steps
done. More keys may be added: all of them reach the file and Weights & Biases.
"""

import json
import math
import netrc
import os
import socket
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TextIO
from urllib.parse import urlsplit
from urllib.request import getproxies

from megagpt.config.schema import LoggingConfig, WandbConfig
from megagpt.errors import ConfigError

Record = dict[str, Any]
"""Name -> number (int or float)."""


class Logger(Protocol):
    """A place to report to."""

    def step(self, record: Record) -> None:
        """Report one training or evaluation record."""

    def rewind(self, step: int) -> None:
        """The run has gone back to `step`; the steps after it will come again."""

    def close(self) -> None:
        """Nothing more will come."""


def build_loggers(logging: LoggingConfig, total_steps: int, run_config: Record, start_step: int = 0) -> Logger:
    """All that `logging` asks for, as one logger. Call it on rank 0 alone.

    `run_config`: the config tree and the layout, attached to the Weights & Biases run. `start_step`: steps
    done before this start; the metrics file forgets later ones, which will come again.
    Raises ConfigError for a metrics file that cannot be written or holds something else.
    """
    loggers: list[Logger] = [Console(total_steps)]
    if logging.metrics_file is not None:
        metrics = MetricsFile(logging.metrics_file)
        metrics.truncate_after(start_step)
        loggers.append(metrics)
    if logging.wandb.project is not None:
        loggers.append(WandbLogger(logging.wandb, run_config))
    return FanOut(loggers)


class FanOut:
    """Several loggers as one; without any, it keeps silent."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self._loggers = tuple(loggers)

    def step(self, record: Record) -> None:
        """Report `record` to each."""
        for logger in self._loggers:
            logger.step(record)

    def rewind(self, step: int) -> None:
        """Rewind each."""
        for logger in self._loggers:
            logger.rewind(step)

    def close(self) -> None:
        """Close each."""
        for logger in self._loggers:
            logger.close()


class MetricsFile:
    """One JSON line per record, on disk as soon as it is made. NaN and Infinity stand as `json.loads` reads them."""

    def __init__(self, path: str | Path) -> None:
        """Appends to `path`, making its folders; raises ConfigError where it cannot."""
        self._path = Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"logging.metrics_file: {path}: cannot be written: {error.strerror}") from None

    def step(self, record: Record) -> None:
        """Append `record`."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        """As at a start after `step`."""
        self.truncate_after(step)

    def truncate_after(self, step: int) -> None:
        """Drop the records of steps after `step`, and a last line that a killed run left torn.

        A start at step 0 over the records of another run keeps those as `<name>.previous`.
        Raises ConfigError for a file that has other things in it: it is not ours to cut.
        """
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if lines and not (lines[-1].endswith("\n") and _is_record(lines[-1])):
            lines.pop()
        for number, line in enumerate(lines, start=1):
            if not _is_record(line):
                raise ConfigError(
                    f"logging.metrics_file: {self._path}: line {number} is not a JSON record with a step; name another file"
                )
        if step == 0 and lines:
            self._path.with_name(self._path.name + ".previous").write_text("".join(lines), encoding="utf-8")
        kept = [line for line in lines if json.loads(line)["step"] <= step and step > 0]
        aside = self._path.with_name(self._path.name + ".new")
        aside.write_text("".join(kept), encoding="utf-8")
        self._file.close()
        aside.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Console:
    """A line for people: how far, how well, how fast, how much longer."""

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        """Writes to `stream`, the standard output of the moment if None."""
        self._total, self._stream = total_steps, stream

    def step(self, record: Record) -> None:
        """Print `record`."""
        split = next((split for split in ("eval", "test") if f"{split}_loss" in record), None)
        parts = _evaluation_parts(record, split) if split else self._training_parts(record)
        head = f"step {record['step']:>{len(str(self._total))}}/{self._total}"
        print(" | ".join([head, *parts]), file=self._stream or sys.stdout, flush=True)

    def rewind(self, step: int) -> None:
        """Nothing to do: what was printed stays."""

    def close(self) -> None:
        """Nothing to do: the stream is not ours."""

    def _training_parts(self, record: Record) -> list[str]:
        left = (self._total - record["step"]) * record["step_seconds"]
        return [
            f"loss {record['loss']:.4f}",
            f"lr {record['learning_rate']:.3e}",
            f"grad norm {record['grad_norm']:.3f}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
            f"{record['step_seconds']:.3f} s/step",
            f"{timedelta(seconds=round(left))} left" if math.isfinite(left) else "? left",
        ]


class WandbLogger:
    """Weights & Biases: online where there is an API key and a way to its server, else in local files to sync later."""

    def __init__(self, config: WandbConfig, run_config: Record) -> None:
        """Starts the run, with `run_config` attached. Raises ConfigError where the wandb package is missing."""
        try:
            import wandb
        except ImportError:
            raise ConfigError("logging.wandb.project: needs the wandb package; pip install wandb, or leave it out") from None

        self._teardown = wandb.teardown
        self._run = wandb.init(
            project=config.project,
            name=config.name,
            dir=config.dir,
            config=run_config,
            mode=_wandb_mode(wandb.setup().settings),
            settings=wandb.Settings(console="off"),
        )

    def step(self, record: Record) -> None:
        """Log all of `record` but its step, which is the run's step."""
        self._run.log({key: value for key, value in record.items() if key != "step"}, step=record["step"])

    def rewind(self, step: int) -> None:
        """Nothing to do: wandb keeps the first record of a step and drops those that come again."""

    def close(self) -> None:
        """End the run; all of it is in its files on return."""
        self._run.finish()
        self._teardown()  # in wandb 0.31 finish() can return before the service has written the run's file


def _evaluation_parts(record: Record, split: str) -> list[str]:
    return [f"{split} loss {record[f'{split}_loss']:.4f}", f"perplexity {record[f'{split}_perplexity']:.2f}"]


def _is_record(line: str) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int)


def _wandb_mode(settings: Any) -> Any:
    """`online` or `offline`; None, which leaves it to wandb, where the user has set wandb's own WANDB_MODE."""
    if os.environ.get("WANDB_MODE"):
        return None
    has_key = bool(settings.api_key) or _netrc_has(urlsplit(settings.base_url).netloc)
    return "online" if has_key and _reachable(getproxies().get("https") or settings.base_url) else "offline"


def _netrc_has(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _reachable(url: str) -> bool:
    address = urlsplit(url)
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=3):
            return True
    except OSError:
        return False
