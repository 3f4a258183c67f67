"""Pairs of a source and a target, one in each sample."""

from pathlib import Path

import numpy as np
import pytest

from megagpt.config.schema import DataConfig
from megagpt.data.blend import build_datasets
from megagpt.data.encoder_samples import EncoderFormat
from megagpt.data.examples import mask_prefix
from megagpt.data.indexed import IndexedWriter
from megagpt.data.pairs import Pairs
from megagpt.errors import DataError
from megagpt.labels import IGNORED

END, START = 1, 7
SIZES = [(3, 2), (8, 4), (9, 3), (5, 6), (2, 5)]
"""Tokens of source and target of each pair, with the end."""
POSITIONS, LENGTH = 8, 5


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    path = tmp_path / "data_pairs"
    with IndexedWriter(path, np.dtype(np.uint16)) as tokens, IndexedWriter(mask_prefix(str(path)), np.dtype(np.uint8)) as mask:
        for number, sizes in enumerate(SIZES, 1):
            tokens.add_document(*([10 * number + n for n in range(size - 1)] + [END] for size in sizes))
            mask.add_document(*([part] * size for part, size in enumerate(sizes)))
    return str(path)


def pairs(prefix: str, **keys: object) -> Pairs:
    data = DataConfig.model_validate({"train": prefix, "task": "pairs", **keys})
    train = build_datasets(data, LENGTH, EncoderFormat(POSITIONS, START)).train
    assert isinstance(train, Pairs)
    return train


def test_an_epoch_has_each_pair_once_with_source_and_target_in_their_places(prefix: str) -> None:
    found = {}
    train = pairs(prefix)
    for index in range(train.samples_per_epoch):
        sample = train.sample(index)
        assert sample.source is not None and sample.labels is not None
        target = sample.labels[sample.labels != IGNORED]
        assert sample.tokens[: len(target) + 1].tolist() == [START, *target]
        assert (len(sample.source), len(sample.tokens), len(sample.labels)) == (POSITIONS, LENGTH + 1, LENGTH)
        assert sample.source[sample.source_length - 1] == target[-1] == END
        found[int(sample.source[0]) // 10] = (sample.source_length, len(target))
    assert found == {1: (3, 2), 2: (8, 4), 5: (2, 5)}  # the others are too long
    assert train.n_dropped == 2 and "3 pairs; 2 longer than 8 or 5 tokens dropped" in train.summary


def test_a_long_part_is_cut_and_keeps_its_end_if_the_config_says_so(prefix: str) -> None:
    train = pairs(prefix, long_examples="truncate")
    samples = [train.sample(index) for index in range(train.samples_per_epoch)]
    by_pair = {int(sample.source[0]) // 10: sample for sample in samples if sample.source is not None}
    assert sorted(by_pair) == [1, 2, 3, 4, 5] and train.n_truncated == 2
    source, labels = by_pair[3].source, by_pair[4].labels
    assert source is not None and source.tolist() == [*range(30, 37), END]
    assert labels is not None and labels.tolist() == [*range(40, 44), END]


def test_the_order_depends_on_the_seed_and_the_epoch(prefix: str) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        train = pairs(prefix, long_examples="truncate", seed=seed)
        return [int(train.sample(5 * epoch + index).tokens[1]) for index in range(5)]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) > 8


def test_pairs_that_are_all_too_long_are_an_error(prefix: str) -> None:
    data = DataConfig.model_validate({"train": prefix, "task": "pairs"})
    with pytest.raises(DataError, match="none of 5 pairs fits into model.encoder_positions 1 and model.n_positions 1"):
        build_datasets(data, 1, EncoderFormat(1, START))
