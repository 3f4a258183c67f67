"""Problems of the `logging` section that can be found before the engine is built. Does not import torch."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

from megagpt.config.schema import Config
from megagpt.errors import ConfigError
from megagpt.training.loggers.metrics_file import cannot_write, read_contents, require_metrics_file
from megagpt.training.loggers.wandb_run_id import RUN_ID_FILE

CHECKPOINT_FOLDER = re.compile(r"step_\d{8,}(\..*)?")
"""Name of a checkpoint's folder, also of one that is being written or deleted."""
CHECKPOINT_FILE = re.compile(rf"(step_|latest|{RUN_ID_FILE}|\.).*")
"""Names beside the checkpoints that the run itself uses."""


def check_loggers(config: Config) -> None:
    """Check that the loggers of a config can be used. Writes nothing.

    Raises ConfigError if a package is missing, and if the metrics file cannot be written, contains anything else than
    records, or is a place that the run uses for something else.
    """
    logging = config.logging
    if logging.metrics_file is not None:
        path = require_metrics_file(logging.metrics_file)
        _require_own_place(path, config)
        try:
            if path.exists():
                read_contents(path, step=0)
        except OSError as error:
            raise cannot_write(path, error) from None
    if logging.wandb.project is not None:
        _require_package("wandb", "logging.wandb.project")
    if logging.tensorboard.dir is not None:
        _require_package("tensorboard", "logging.tensorboard.dir")


def _require_own_place(path: Path, config: Config) -> None:
    """Raise ConfigError if the metrics file would be mixed with another output of the run. `path`: resolved."""
    problem = f"logging.metrics_file: {path}:"
    for parent in path.parents:
        if CHECKPOINT_FOLDER.fullmatch(parent.name):
            raise ConfigError(f"{problem} is in a checkpoint, whose files must not change; name a file outside of {parent}")
    for key, value in {
        "checkpoint.dir": config.checkpoint.dir,
        "logging.wandb.dir": config.logging.wandb.dir,
        "logging.tensorboard.dir": config.logging.tensorboard.dir,
        "data.cache_dir": config.data.cache_dir,
    }.items():
        folder = Path(os.path.realpath(value)) if value is not None else None
        if folder is not None and path in (folder, *folder.parents):
            raise ConfigError(f"{problem} must be a folder because of {key} {value}; name another file")
        if folder == path.parent and key == "checkpoint.dir" and CHECKPOINT_FILE.fullmatch(path.name):
            raise ConfigError(f"{problem} {path.name} is a name that checkpoints use in checkpoint.dir; name another file")
    for descriptor, name in ((1, "standard output"), (2, "standard error")):
        if _is_open_file(path, descriptor):
            raise ConfigError(f"{problem} is the file that {name} goes to; name another file")


def _is_open_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _require_package(name: str, key: str) -> None:
    """Raise ConfigError if a package is not installed. A folder of that name, with logs, is not a package."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{key}: needs the {name} package; install it (pip install {name}), or leave the key out")
