"""Samples of packed examples: every example once per epoch, entire, with its labels; the same for any position."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.examples import random_example, random_examples, write_examples

from megagpt.config.schema import DataConfig
from megagpt.data.blend import build_datasets
from megagpt.data.examples import PADDING, PackedExamples
from megagpt.data.gpt_dataset import Sample
from megagpt.data.identity import data_identity, training_data_changes
from megagpt.data.indexed import IndexedCorpus
from megagpt.errors import DataError
from megagpt.labels import IGNORED

LENGTH = 16


def dataset(prefix: str, **keys: object) -> PackedExamples:
    train = build_datasets(DataConfig.model_validate({"train": prefix, "task": "chat", **keys}), LENGTH).train
    assert isinstance(train, PackedExamples)
    return train


def documents(sample: Sample) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the tokens of each document of a sample, and the labels at their positions, without the padding."""
    assert sample.labels is not None
    pieces = []
    bounds = [*np.flatnonzero(sample.starts), len(sample.tokens)]
    for start, end in pairwise(bounds):
        pieces.append((tuple(sample.tokens[start:end].tolist()), tuple(sample.labels[start : end - 1].tolist())))
    return pieces


def test_an_epoch_has_every_example_once_with_the_labels_of_its_answer(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    examples = [random_example(generator, int(size)) for size in generator.integers(2, LENGTH + 2, 40)]
    train = dataset(write_examples(tmp_path / "x", [[example] for example in examples]))
    expected: Counter[object] = Counter()
    for ids, learned in examples:
        labels = [token if mine else IGNORED for token, mine in zip(ids[1:], learned[1:], strict=True)]
        expected[tuple(ids), tuple(labels)] += 1
    for epoch in range(2):
        found: Counter[object] = Counter()
        for index in range(train.samples_per_epoch):
            sample = train.sample(epoch * train.samples_per_epoch + index)
            for tokens, labels in documents(sample):
                if set(labels) <= {IGNORED} and set(tokens) == {PADDING}:
                    continue  # padding
                found[tokens, labels] += 1
        assert found == expected


def test_no_label_crosses_from_one_example_to_the_next(tmp_path: Path) -> None:
    """A mask that counts all tokens must not make the first token of an example a label of the one before."""
    train = dataset(write_examples(tmp_path / "x", [[([7, 8, 9], [1, 1, 1])], [([4, 5], [1, 1])]]))
    sample = train.sample(0)
    assert sample.tokens.tolist() == [7, 8, 9, 4, 5] + [PADDING] * (LENGTH - 4)
    assert sample.labels is not None
    assert sample.labels.tolist() == [8, 9, IGNORED, 5] + [IGNORED] * (LENGTH - 4)
    assert np.flatnonzero(sample.starts).tolist() == [0, 3, 5]


def test_epochs_have_different_orders_that_depend_on_the_seed_alone(tmp_path: Path) -> None:
    prefix = random_examples(tmp_path / "x", [9] * 30)
    train = dataset(prefix)
    n = train.samples_per_epoch
    orders = [[train.sample(epoch * n + index).tokens.tolist() for index in range(n)] for epoch in range(2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    again = dataset(prefix)
    assert again.sample(n + 3).tokens.tolist() == orders[1][3]  # found directly
    other = dataset(prefix, seed=5)
    assert [other.sample(index).tokens.tolist() for index in range(n)] != orders[0]


def test_examples_that_are_too_long_are_dropped_or_truncated_with_a_count(tmp_path: Path) -> None:
    fits = (list(range(1, LENGTH + 2)), [0] * 8 + [1] * 9)
    long = (list(range(1, 31)), [0] * 10 + [1] * 20)
    without_answer = (list(range(1, 31)), [0] * 25 + [1] * 5)
    prefix = write_examples(tmp_path / "x", [[fits], [long], [without_answer]])
    dropping, truncating = dataset(prefix), dataset(prefix, long_examples="truncate")
    assert (dropping.n_dropped, dropping.n_truncated, dropping.samples_per_epoch) == (2, 0, 1)
    assert dropping.summary == f"{prefix}: 1 examples, 0.0% padding; 2 longer than 17 tokens dropped"
    assert (truncating.n_dropped, truncating.n_truncated, truncating.samples_per_epoch) == (1, 1, 2)
    labels = sorted((truncating.sample(index).labels.tolist() for index in range(2)), reverse=True)  # type: ignore[union-attr]
    assert labels[0] == [IGNORED] * 7 + list(range(9, 18)) and labels[1] == [IGNORED] * 9 + list(range(11, 18))


def test_a_split_divides_examples(tmp_path: Path) -> None:
    prefix = random_examples(tmp_path / "x", [LENGTH + 1] * 20)
    data = DataConfig.model_validate({"paths": prefix, "split": "80,20,0", "task": "chat"})
    train, valid_sets, _ = build_datasets(data, LENGTH)
    valid = valid_sets["eval"]
    assert (train.samples_per_epoch, valid.samples_per_epoch) == (16, 4)
    seen = {tuple(part.sample(index).tokens) for part, n in ((train, 16), (valid, 4)) for index in range(n)}
    assert len(seen) == 20


def test_a_blend_mixes_examples_by_weight(tmp_path: Path) -> None:
    first, second = (random_examples(tmp_path / name, [LENGTH + 1] * 30, seed) for seed, name in enumerate("ab"))
    data = DataConfig.model_validate({"train": {first: 3.0, second: 1.0}, "task": "chat"})
    train = build_datasets(data, LENGTH).train
    of_first = {tuple(dataset(first).sample(index).tokens) for index in range(30)}
    assert sum(tuple(train.sample(index).tokens) in of_first for index in range(20)) == 15


def test_a_pair_without_a_mask_or_with_the_mask_of_another_is_refused(tmp_path: Path) -> None:
    prefix, other = random_examples(tmp_path / "a", [5, 6]), random_examples(tmp_path / "b", [6, 5])
    Path(f"{other}.mask.idx").replace(f"{prefix}.mask.idx")
    with pytest.raises(DataError, match=r"a.mask.idx: is the mask of another pair than .*a; write both again"):
        dataset(prefix)
    with pytest.raises(DataError, match=r"b.mask.idx: no such file; data.task needs the mask that preprocess_data.py --task"):
        dataset(other)


def test_examples_that_all_exceed_the_sequence_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 3 examples fits into the 17 tokens of model.n_positions 16 \+ 1"):
        dataset(random_examples(tmp_path / "x", [30] * 3))


def test_the_identity_of_the_data_has_the_task_and_the_mask(tmp_path: Path) -> None:
    prefix = write_examples(tmp_path / "x", [[([1, 2, 3], [0, 0, 1])]])
    chat = DataConfig(train=prefix, task="chat")
    before = data_identity(chat, LENGTH)
    assert training_data_changes(before, data_identity(DataConfig(train=prefix), LENGTH)) != []
    assert IndexedCorpus(prefix).n_tokens == 3
    write_examples(tmp_path / "x", [[([1, 2, 3], [0, 1, 1])]])
    (change,) = training_data_changes(before, data_identity(chat, LENGTH))
    assert change.startswith("data.train was ")
