"""Blends return the samples of their corpora in the given shares, near and far into the stream; splits are contiguous."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagpt.config.schema import DataConfig
from megagpt.data.blend import Blend, build_datasets, split_ranges
from megagpt.data.indexed import IndexedWriter
from megagpt.errors import DataError


class Numbered:
    """A corpus whose samples are its own number and the index of the sample."""

    samples_per_epoch = 10

    def __init__(self, number: int) -> None:
        self._number = number

    def sample(self, index: int) -> Any:
        return self._number, index


def blend_of(weights: list[float]) -> Blend:
    return Blend([Numbered(number) for number in range(len(weights))], weights)


def test_each_sample_of_a_corpus_comes_once_and_in_order() -> None:
    blend = blend_of([0.7, 0.2, 0.1])
    counts = Counter[int]()
    for index in range(95):
        corpus, corpus_index = blend.sample(index)
        assert corpus_index == counts[corpus]
        counts[corpus] += 1


def test_a_sample_far_into_the_stream_is_found_without_a_walk_through_the_samples_before() -> None:
    far = 10**12  # too far for a loop
    assert blend_of([7, 2, 1]).sample(far) == (0, far * 7 // 10)


def test_a_weight_that_is_too_small_a_share_is_refused() -> None:
    with pytest.raises(DataError, match="weights 1, 1e-09: a share of 1e-09 is below 2.4e-07; leave it out"):
        blend_of([1, 1e-9])


@pytest.mark.parametrize(
    "n, split", [(1000, "949,50,1"), (7, "98,1,1"), (10, "85,10,5"), (3, "0,1,1"), (123457, "0.9,0.05,0.05")]
)
def test_splits_are_rounded_cumulative_shares_and_cover_all_sequences(n: int, split: str) -> None:
    shares = np.array([float(share) for share in split.split(",")])
    end = 0
    for sequences, bound in zip(split_ranges(n, split), np.cumsum(shares / shares.sum()), strict=True):
        assert sequences.start == end and abs(sequences.stop - bound * n) <= 0.5 + 1e-9
        end = sequences.stop
    assert end == n


@pytest.mark.parametrize("split, part", [("90,5,5", "valid"), ("0.1,0.9,0", "train"), ("90,0,10", "test")])
def test_a_split_that_leaves_a_part_too_short_names_the_part_and_the_reason(tmp_path: Path, split: str, part: str) -> None:
    """A file of text is one document, which belongs to one part."""
    with IndexedWriter(tmp_path / "novel", np.dtype(np.uint16)) as writer:
        writer.add_documents(np.zeros(1000, np.uint16), np.array([1000]))
    data = DataConfig(paths=str(tmp_path / "novel"), split=split)
    message = rf"data\.split {split}: {part}: .*novel: 0 tokens in 0 of its 1 documents, too few .*--text-separator"
    with pytest.raises(DataError, match=message):
        build_datasets(data, 128)
