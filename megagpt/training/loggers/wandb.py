"""Metrics to Weights & Biases."""

import netrc
import os
import socket
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from megagpt.config.schema import WandbConfig
from megagpt.errors import ConfigError
from megagpt.training.loggers.base import MetricsRecord


class WandbLogger:
    """Logs online if there is an API key and the server is reachable, else to local files that can be synced later."""

    def __init__(self, config: WandbConfig, run_config: MetricsRecord) -> None:
        """Start the run, with `run_config` attached. Raises ConfigError if the wandb package is missing."""
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "logging.wandb.project: needs the wandb package; install it (pip install wandb), or leave the key out"
            ) from None

        self._teardown = wandb.teardown
        self._run = wandb.init(
            project=config.project,
            name=config.name,
            dir=config.dir,
            config=run_config,
            mode=wandb_mode(wandb.setup().settings),
            settings=wandb.Settings(console="off"),
        )

    def step(self, record: MetricsRecord) -> None:
        """Log all of `record`; its step becomes the step of the run."""
        self._run.log({key: value for key, value in record.items() if key != "step"}, step=record["step"])

    def rewind(self, step: int) -> None:
        """Do nothing: wandb keeps the first record of a step and drops repeated ones."""

    def close(self) -> None:
        """End the run; all its files are complete on return."""
        self._run.finish()
        self._teardown()  # in wandb 0.31 finish() can return before the service has written the run's file


def wandb_mode(settings: Any) -> Literal["online", "offline"] | None:
    """Return "online" if there is an API key for the server of wandb's `settings` and the server answers, else "offline".

    Returns None if the user set WANDB_MODE, which wandb reads itself.
    """
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
