"""The loggers that a config asks for. A new tracker is one file in this folder, one config section and one line here."""

from megagpt.config.schema import LoggingConfig
from megagpt.training.loggers.base import FanOut, Logger, MetricsRecord
from megagpt.training.loggers.console import ConsoleLogger
from megagpt.training.loggers.jsonl import JsonlLogger
from megagpt.training.loggers.wandb import WandbLogger


def build_loggers(logging: LoggingConfig, total_steps: int, run_config: MetricsRecord, start_step: int = 0) -> Logger:
    """Build all loggers of the config as one. Call it on rank 0 only.

    `run_config`: config and layout, attached to the Weights & Biases run. `start_step`: completed steps at this start;
    later records in the metrics file are dropped, because these steps run again.
    Raises ConfigError if the metrics file cannot be written or contains something else.
    """
    loggers: list[Logger] = [ConsoleLogger(total_steps)]
    if logging.metrics_file is not None:
        metrics = JsonlLogger(logging.metrics_file)
        metrics.truncate_after(start_step)
        loggers.append(metrics)
    if logging.wandb.project is not None:
        loggers.append(WandbLogger(logging.wandb, run_config))
    return FanOut(loggers)
