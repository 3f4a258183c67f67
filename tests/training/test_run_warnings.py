"""Settings without an effect and probable mistakes are one sentence each, and a sensible run has none."""

from pathlib import Path

import numpy as np
import pytest
from support.runs import Tree, corpus, tiny_config

from megagpt.data.blend import build_datasets
from megagpt.data.indexed import IndexedWriter
from megagpt.data.tokenizer import ByteTokenizer
from megagpt.training.run_warnings import config_warnings, data_warnings, epochs_of_each, tokenizer_warnings

DIR: Tree = {"dir": "runs/x"}


@pytest.mark.parametrize(
    ("sections", "has_valid", "start"),
    [
        ({"checkpoint": {}}, True, "nothing will be saved: checkpoint.dir is not set"),
        ({"evaluation": {"interval": 5}}, False, "evaluation.interval: 5 has no effect"),
        ({"evaluation": {"interval": 21}}, True, "evaluation.interval: 21 is never reached in a run of 20 steps"),
        ({"checkpoint": {**DIR, "interval": 21}}, True, "checkpoint.interval: 21 is never reached"),
        ({"resilience": {"on_spike": "skip"}}, True, "resilience.spike_window: 100 is never reached"),
        ({"lr_schedule": {"warmup_steps": 21}}, True, "lr_schedule.warmup_steps: 21 is longer than the run of 20"),
        (
            {"lr_schedule": {"decay_steps": 15}},
            True,
            "lr_schedule.decay_steps: after step 15 the learning rate is 0, so the last 5",
        ),
        ({"lr_schedule": {"decay_steps": 30}}, True, "lr_schedule.decay_steps: 30 is above the 20 steps"),
        ({"lr_schedule": {"type": "warmup-stable-decay", "decay_steps": 21}}, True, "lr_schedule.decay_steps: 21 and"),
        ({"lr_schedule": {"type": "constant", "decay_steps": 5}}, True, "lr_schedule.decay_steps: 5 has no effect"),
        ({"optimizer": {"momentum": 0.9}}, True, "optimizer.momentum: 0.9 has no effect with optimizer.type adamw"),
        ({"model": {"clf_pdrop": 0.1}}, True, "model.clf_pdrop: 0.1 has no effect"),
        ({"training": {"recompute_layers": 2}}, True, "training.recompute_layers: 2 has no effect"),
        ({"evaluation": {"micro_batch_size": 2}}, True, "evaluation.micro_batch_size: 2 has no effect"),
        ({"logging": {"wandb": {"name": "a"}}}, True, "logging.wandb.name: has no effect"),
    ],
)
def test_each_setting_without_an_effect_is_one_sentence(sections: Tree, has_valid: bool, start: str) -> None:
    (warning,) = config_warnings(tiny_config(**{"checkpoint": DIR, **sections}), 20, has_valid)
    assert warning.startswith(start)


def test_settings_that_take_effect_in_the_last_step_give_no_warning() -> None:
    config = tiny_config(
        checkpoint={**DIR, "interval": 20},
        evaluation={"interval": 20},
        lr_schedule={"warmup_steps": 20, "type": "inverse-sqrt"},
    )
    assert config_warnings(config, 20, True) == []
    assert config_warnings(tiny_config(checkpoint=DIR, lr_schedule={"decay_steps": 15, "min_lr": 1e-5}), 20, True) == []


def documents(folder: Path, sizes: list[int], last_token: int) -> str:
    """Write documents of token 1 that end with `last_token`; return the prefix."""
    tokens = [token for size in sizes for token in [1] * (size - 1) + [last_token]]
    with IndexedWriter(folder / "documents", np.dtype(np.uint16)) as writer:
        writer.add_documents(np.array(tokens, np.uint16), sizes)
    return str(folder / "documents")


@pytest.mark.parametrize(("vocab_size", "last_token", "n_warnings"), [(257, 256, 0), (257, 7, 1), (300, 256, 1), (300, 7, 2)])
def test_a_model_or_data_of_another_tokenizer_is_noticed(
    vocab_size: int, last_token: int, n_warnings: int, tmp_path: Path
) -> None:
    data = {"train": documents(tmp_path, [5, 40, 9], last_token)}
    config = tiny_config(model={"vocab_size": vocab_size}, data=data)
    warnings = tokenizer_warnings(config, build_datasets(config.data, 16), ByteTokenizer())
    assert len(warnings) == n_warnings
    assert any("vocab_size is 300, but the tokenizer has 257 tokens" in text for text in warnings) == (vocab_size == 300)
    assert any("no document ends with" in text for text in warnings) == (last_token == 7)


def test_masked_labels_and_many_epochs_are_noticed(tmp_path: Path) -> None:
    short = tiny_config(data={"train": documents(tmp_path, [1] * 100, 7), "mask_document_ends": True})
    dataset = build_datasets(short.data, 16).train
    assert dataset.samples_per_epoch == 6
    assert [text.split(":")[0] for text in data_warnings(short, dataset, 6)] == ["data.mask_document_ends"]
    (repeated, _) = data_warnings(short, dataset, 27)
    assert "is read 4.5 times" in repeated
    unmasked = tiny_config(data={"train": short.data.train})
    assert data_warnings(unmasked, dataset, 24) == []


def test_the_epochs_of_a_blend_are_those_of_each_corpus(tmp_path: Path) -> None:
    prefixes = [corpus(tmp_path / name, size) for name, size in (("a", 60), ("b", 20))]
    dataset = build_datasets(tiny_config(data={"train": {prefixes[0]: 0.25, prefixes[1]: 0.75}}).data, 16).train
    counts = [0, 0]
    for index in range(100):
        counts[dataset._interleave.at(index)[0]] += 1  # type: ignore[attr-defined]
    epochs = epochs_of_each(dataset, 100)
    assert [round(number * packed.samples_per_epoch) for packed, number in epochs] == counts == [25, 75]
