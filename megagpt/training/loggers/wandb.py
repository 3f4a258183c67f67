"""Metrics to Weights & Biases."""

import netrc
import os
import socket
import sys
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from megagpt.config.schema import WandbConfig
from megagpt.errors import ConfigError
from megagpt.training.loggers.base import MetricsRecord
from megagpt.training.loggers.wandb_run_id import RUN_ID_FILE, read_run_id, write_run_id


class WandbLogger:
    """Logs online if there is an API key and the server is reachable, else to local files that can be synced later.

    The x axis is the metric `step`. W&B's own step counts records, because it drops a record whose step is not above the
    last one, and a run that resumes or rolls back repeats steps.
    """

    def __init__(self, config: WandbConfig, run_config: MetricsRecord, checkpoints: Path | None, start_step: int) -> None:
        """Start the run with `run_config` attached, or resume it.

        `checkpoints`: the folder of the run's checkpoints, which keeps the id of the run; without it, and at step 0, this is
        a new run. The user's WANDB_RUN_ID has priority. Raises ConfigError if W&B refuses the run.
        """
        import wandb

        run_id = read_run_id(checkpoints) if checkpoints is not None and start_step > 0 else None
        if os.environ.get("WANDB_RUN_ID"):
            run_id = None  # wandb reads it itself
        self._teardown = wandb.teardown
        try:
            self._run = wandb.init(
                project=config.project,
                name=config.name,
                dir=config.dir,
                config=run_config,
                mode=wandb_mode(wandb.setup().settings),
                id=run_id,
                resume="allow" if run_id is not None else None,
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            kept = f"; for a new run, remove {checkpoints}/{RUN_ID_FILE}" if run_id is not None else ""
            raise ConfigError(
                f"logging.wandb.project: {config.project}: Weights & Biases refuses the run: {str(error).splitlines()[0]}{kept}"
            ) from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if checkpoints is not None:
            write_run_id(checkpoints, self._run.id)

    def step(self, record: MetricsRecord) -> None:
        """Log all of `record`."""
        self._run.log(record)

    def rewind(self, step: int) -> None:
        """Do nothing: repeated steps are logged again, and the later values are drawn after the earlier ones."""

    def close(self) -> None:
        """End the run; all its files are complete on return. While an exception is handled, the run counts as failed."""
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))
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
