"""The length of a run in steps, and what a resumed run says about it."""

import json
from typing import Any

from pydantic import ValidationError

from megagpt.config.schema import Config, LRScheduleConfig, OptimizerConfig, TrainingConfig
from megagpt.data.blend import Datasets
from megagpt.errors import ConfigError
from megagpt.training.batch_schedule import batch_size, steps_between
from megagpt.training.lr_schedule import learning_rate

SMALL_CHANGE = 0.01
"""Change of the learning rate, as a share of the peak, that needs no note."""


def total_steps(config: Config, datasets: Datasets, step: int = 0, consumed_samples: int = 0) -> int:
    """Return the length of the run in optimizer steps.

    `step` and `consumed_samples`: progress so far, maybe with other batch sizes.
    Raises ConfigError if an epoch is shorter than one step.
    """
    training = config.training
    if training.steps is not None:
        return training.steps
    target = _target_samples(config, datasets)
    more, end = steps_between(consumed_samples, target, training)
    if training.tokens is not None:
        return step + more
    steps = step + more - (more > 0 and end > target)
    if steps == 0:
        key = "global_batch_size" if training.batch_ramp.start is None else "batch_ramp.start"
        raise ConfigError(
            f"training.epochs: {training.epochs:g} epochs of {datasets.train.samples_per_epoch} samples are less than "
            f"one step of training.{key} {batch_size(0, training)}"
        )
    return steps


def require_not_shorter(config: Config, datasets: Datasets, step: int, consumed_samples: int) -> None:
    """Raise ConfigError if the config asks for fewer steps, tokens or epochs than a checkpoint has."""
    training = config.training
    if training.steps is not None:
        if training.steps >= step:
            return
        asked, done = f"training.steps: {training.steps}", f"{step} steps"
    elif consumed_samples - training.global_batch_size < _target_samples(config, datasets):
        return  # a complete run ends less than one batch beyond its target
    elif training.tokens is not None:
        asked, done = f"training.tokens: {training.tokens:,}", f"{consumed_samples * config.model.sample_tokens:,} tokens"
    else:
        asked = f"training.epochs: {training.epochs:g}"
        done = f"{consumed_samples / datasets.train.samples_per_epoch:.4g} epochs"
    raise ConfigError(
        f"{asked}, but the checkpoint has {done}, so there is nothing to do; ask for more, or use checkpoint.initialize_from "
        "to start a new run from its weights"
    )


def learning_rate_change(saved: dict[str, Any], config: Config, datasets: Datasets, step: int, total: int) -> str | None:
    """Return a warning if the next step's learning rate is not the one that the checkpoint's config gives, else None.

    `saved`: the checkpoint's config. `step`: its steps. `total`: the length of the run now.
    """
    try:
        optimizer = OptimizerConfig.model_validate_json(json.dumps(saved["optimizer"]))
        schedule = LRScheduleConfig.model_validate_json(json.dumps(saved["lr_schedule"]))
        training = TrainingConfig.model_validate_json(json.dumps(saved["training"]))
        saved_total = total_steps(config.model_copy(update={"training": training}), datasets)
    except (ValidationError, KeyError, TypeError, ConfigError):
        return None  # of another version of megagpt, or of data that was much longer
    before = learning_rate(step, saved_total, optimizer.learning_rate, schedule)
    after = learning_rate(step, total, config.optimizer.learning_rate, config.lr_schedule)
    if abs(after - before) <= SMALL_CHANGE * config.optimizer.learning_rate:
        return None
    text = f"the learning rate of step {step + 1} is {after:.3g}; with the checkpoint's config it would be {before:.3g}"
    if (schedule, optimizer.learning_rate) != (config.lr_schedule, config.optimizer.learning_rate):
        return f"{text}, because lr_schedule or optimizer.learning_rate has changed"
    text += f", because the schedule was made for {saved_total} steps and is stretched to {total}"
    if schedule.type in ("cosine", "linear"):
        text += f"; to keep the earlier schedule, set lr_schedule.decay_steps={saved_total}"
    return text


def _target_samples(config: Config, datasets: Datasets) -> int:
    """Return the samples that training.tokens or training.epochs asks for."""
    training = config.training
    if training.tokens is not None:
        return -(-training.tokens // config.model.sample_tokens)
    assert training.epochs is not None
    return int(training.epochs * datasets.train.samples_per_epoch)
