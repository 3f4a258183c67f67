"""The loggers that a config asks for. A new tracker is one file in this folder, one config section and one line here."""

from pathlib import Path

import torch

from megagpt.config.schema import Config
from megagpt.parallel.topology import Layout
from megagpt.training.loggers.base import FanOut, Logger, Tolerant
from megagpt.training.loggers.check import check_loggers
from megagpt.training.loggers.console import ConsoleLogger
from megagpt.training.loggers.jsonl import JsonlLogger
from megagpt.training.loggers.wandb import WandbLogger


def build_loggers(config: Config, layout: Layout, device: torch.device, start_step: int, total_steps: int) -> Logger:
    """Build all loggers of the config as one. Call it on rank 0 only.

    `start_step`: completed steps at this start; the loggers drop or ignore later records, because these steps run again.
    Raises ConfigError if a logger cannot be used.
    """
    check_loggers(config)
    logging = config.logging
    loggers: list[Logger] = [ConsoleLogger(total_steps, device.type)]
    if logging.metrics_file is not None:
        loggers.append(JsonlLogger(logging.metrics_file, start_step))
    if logging.tensorboard.dir is not None:
        from megagpt.training.loggers.tensorboard import TensorBoardLogger  # needs a package that may be absent

        loggers.append(Tolerant(TensorBoardLogger(logging.tensorboard.dir, start_step), "logging.tensorboard"))
    if logging.wandb.project is not None:
        run_config = {**config.model_dump(mode="json"), "layout": vars(layout)}
        checkpoints = Path(config.checkpoint.dir) if config.checkpoint.dir is not None else None
        loggers.append(Tolerant(WandbLogger(logging.wandb, run_config, checkpoints, start_step), "logging.wandb"))
    return FanOut(loggers)
