"""The length of a run in steps, and what a resumed run says about it."""

from types import SimpleNamespace
from typing import Any

import pytest
from support.runs import Tree, tiny_config

from megagpt.errors import ConfigError
from megagpt.training.lr_schedule import learning_rate
from megagpt.training.run_length import learning_rate_change, require_not_shorter, total_steps

SEQ = 16
"""Tokens of a sequence."""
DATASETS: Any = SimpleNamespace(train=SimpleNamespace(samples_per_epoch=100))


def length(step: int = 0, consumed: int = 0, **training: Any) -> int:
    """Return the number of steps of a run with 100 samples per epoch."""
    config = tiny_config(training={"steps": None, "global_batch_size": 8, **training})
    return total_steps(config, DATASETS, step, consumed)


def test_the_length_of_a_run_is_its_steps_or_follows_from_tokens_or_epochs() -> None:
    assert length(steps=7) == 7
    assert [length(tokens=tokens) for tokens in (1, 8 * SEQ, 8 * SEQ + 1)] == [1, 1, 2]
    assert [length(epochs=epochs) for epochs in (0.08, 1, 1.04, 2)] == [1, 12, 13, 25]


def test_the_length_of_a_resumed_run_counts_the_samples_so_far() -> None:
    """After 3 steps of 16 samples, 52 of 100 samples remain."""
    assert length(step=3, consumed=48, epochs=1) == 3 + 6
    assert length(step=3, consumed=48, tokens=100 * SEQ) == 3 + 7
    assert length(step=3, consumed=48, steps=5) == 5
    assert length(step=20, consumed=160, epochs=1) == 20


def test_epochs_shorter_than_a_step_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        length(epochs=0.07)
    assert str(error.value) == (
        "training.epochs: 0.07 epochs of 100 samples are less than one step of training.global_batch_size 8"
    )


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"steps": 9}, "training.steps: 9, but the checkpoint has 10 steps"),
        ({"tokens": 60 * SEQ}, "training.tokens: 960, but the checkpoint has 1,280 tokens"),
        ({"epochs": 0.5}, "training.epochs: 0.5, but the checkpoint has 0.8 epochs"),
    ],
)
def test_fewer_steps_than_the_checkpoint_has_are_refused(training: Tree, message: str) -> None:
    """10 steps of 8 sequences were made."""
    config = tiny_config(training={"steps": None, "global_batch_size": 8, **training})
    with pytest.raises(ConfigError) as error:
        require_not_shorter(config, DATASETS, 10, 80)
    assert str(error.value) == (
        f"{message}, so there is nothing to do; ask for more, or use checkpoint.initialize_from to start a new run from its "
        "weights"
    )


@pytest.mark.parametrize("training", [{"steps": 10}, {"steps": 11}, {"tokens": 79 * SEQ}, {"epochs": 0.87}, {"epochs": 0.75}])
def test_a_run_that_is_just_complete_or_longer_is_accepted(training: Tree) -> None:
    """The last step of a run of 79 sequences ends after 80."""
    require_not_shorter(tiny_config(training={"steps": None, "global_batch_size": 8, **training}), DATASETS, 10, 80)


def change(step: int, **sections: Tree) -> str | None:
    """Return the warning for a run that was saved with 20 steps of a cosine and resumes with other settings."""
    saved = tiny_config(training={"steps": 20}, lr_schedule={"warmup_steps": 2}).model_dump(mode="json")
    config = tiny_config(**{"training": {"steps": 20}, "lr_schedule": {"warmup_steps": 2}, **sections})
    return learning_rate_change(saved, config, DATASETS, step, total_steps(config, DATASETS))


def test_a_stretched_schedule_is_reported_with_both_rates_and_the_setting_that_keeps_it() -> None:
    peak, schedule = 1e-2, tiny_config(lr_schedule={"warmup_steps": 2}).lr_schedule
    before, after = learning_rate(15, 20, peak, schedule), learning_rate(15, 40, peak, schedule)
    assert change(15, training={"steps": 40}) == (
        f"the learning rate of step 16 is {after:.3g}; with the checkpoint's config it would be {before:.3g}, because the "
        "schedule was made for 20 steps and is stretched to 40; to keep the earlier schedule, set lr_schedule.decay_steps=20"
    )


def test_a_change_of_the_learning_rate_settings_is_reported() -> None:
    text = change(15, optimizer={"learning_rate": 2e-2})
    assert text is not None and text.endswith("because lr_schedule or optimizer.learning_rate has changed")


def test_nothing_is_reported_if_the_rate_continues() -> None:
    assert change(15) is None
    assert change(1, training={"steps": 40}) is None  # in the warm-up
    kept: Tree = {"warmup_steps": 2, "decay_steps": 20}
    assert change(15, training={"steps": 40}, lr_schedule=kept) is None
    assert learning_rate_change({"training": {}}, tiny_config(), DATASETS, 5, 10) is None
