"""Samples are compared with plain loops over the documents; global batches are the same under every layout."""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megagpt.config.schema import DataConfig
from megagpt.data.blend import build_datasets, check_vocabulary, split_ranges
from megagpt.data.gpt_dataset import PackedCorpus
from megagpt.data.indexed import IndexedCorpus, IndexedWriter
from megagpt.data.sampler import GlobalBatches, TokenBatch
from megagpt.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
PAIR = SHARED / "megatron_indexed" / "meg-gpt2-openwebtext_text_document"


def write(prefix: Path, documents: list[list[int]]) -> str:
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add_documents(np.array([t for d in documents for t in d], np.uint16), [len(d) for d in documents])
    return str(prefix)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    generator = np.random.default_rng(1)
    sizes = generator.integers(1, 40, 50)
    counter = iter(range(10_000))  # every token occurs once, so a token shows which document it comes from
    return write(tmp_path_factory.mktemp("data") / "c", [[next(counter) for _ in range(size)] for size in sizes])


@pytest.mark.skipif(not PAIR.with_suffix(".idx").exists(), reason="../shared is absent")
def test_a_pair_written_by_megatron_is_read_and_written_again_byte_for_byte(tmp_path: Path) -> None:
    corpus = IndexedCorpus(PAIR)
    assert (len(corpus.sizes), corpus.n_tokens) == (1000, 1_361_845)
    with IndexedWriter(tmp_path / "again", corpus.dtype) as writer:
        for sequence in range(1000):
            writer.add_document(corpus.read(sequence))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"again{suffix}").read_bytes() == PAIR.with_suffix(suffix).read_bytes()


def test_an_epoch_is_the_shuffled_documents_cut_into_overlapping_samples(prefix: str) -> None:
    corpus = IndexedCorpus(prefix)
    packed = PackedCorpus(corpus, range(5, 45), 7, seed=3)
    for epoch in (0, 2):
        samples = [packed.sample(epoch * packed.samples_per_epoch + i).tokens for i in range(packed.samples_per_epoch)]
        assert all(len(sample) == 8 for sample in samples)
        seen = [int(token) for sample in samples for token in sample[:-1]]
        assert len(seen) == len(set(seen))  # no token is an input twice
        documents = [corpus.read(sequence).tolist() for sequence in range(5, 45)]
        expected = {token for document in documents for token in document}
        assert set(seen) <= expected and len(expected) - len(seen) <= 7
        next_token = {a: b for document in documents for a, b in pairwise(document)}
        last_tokens = {document[-1] for document in documents}
        for sample in samples:
            for a, b in pairwise(sample.tolist()):
                assert a in last_tokens or next_token[a] == b
    assert not np.array_equal(packed.sample(0).tokens, packed.sample(packed.samples_per_epoch).tokens)
    assert np.array_equal(packed.sample(4).tokens, PackedCorpus(corpus, range(5, 45), 7, seed=3).sample(4).tokens)


@pytest.mark.parametrize("dp_size, micro_batch_size", [(1, 4), (2, 2), (4, 1)])
def test_the_global_batch_does_not_depend_on_the_layout(prefix: str, dp_size: int, micro_batch_size: int) -> None:
    packed = PackedCorpus(IndexedCorpus(prefix), range(50), 7, seed=3)
    for step in (0, 5, 40):
        expected = np.stack([packed.sample(step * 8 + row).tokens for row in range(8)])
        batches: list[TokenBatch] = []
        for dp_rank in range(dp_size):
            batches += GlobalBatches(packed, 8, micro_batch_size, dp_rank, dp_size, 10_000).micro_batches(8 * step)
        assert np.array_equal(np.concatenate([batch.tokens for batch in batches]), expected)
        assert [batch.first_sample for batch in batches] == list(range(8 * step, 8 * step + 8, micro_batch_size))


@pytest.mark.parametrize("first", [0, 3, 10_001])
def test_a_global_batch_may_start_at_any_sample(prefix: str, first: int) -> None:
    packed = PackedCorpus(IndexedCorpus(prefix), range(50), 7, seed=3)
    (batch,) = GlobalBatches(packed, 4, 4, 0, 1, 10_000).micro_batches(first)
    assert np.array_equal(batch.tokens, np.stack([packed.sample(first + row).tokens for row in range(4)]))


def test_a_global_batch_of_another_size_starts_at_the_same_sample(prefix: str) -> None:
    packed = PackedCorpus(IndexedCorpus(prefix), range(50), 7, seed=3)
    batches = [batch for dp_rank in range(2) for batch in GlobalBatches(packed, 4, 2, dp_rank, 2, 10_000).micro_batches(3, 12)]
    expected = np.stack([packed.sample(3 + row).tokens for row in range(12)])
    assert np.array_equal(np.concatenate([batch.tokens for batch in batches]), expected)
    assert [batch.first_sample for batch in batches] == list(range(3, 15, 2))


def test_an_id_above_the_vocabulary_is_reported_with_its_sample(prefix: str) -> None:
    packed = PackedCorpus(IndexedCorpus(prefix), range(50), 7, seed=3)
    with pytest.raises(DataError, match=r"sample 8: token id \d+, but the vocabulary has the ids 0 to 4"):
        GlobalBatches(packed, 4, 2, 0, 1, 5).micro_batches(8)


def test_starts_is_true_exactly_at_the_first_token_of_each_document(prefix: str) -> None:
    corpus = IndexedCorpus(prefix)
    packed = PackedCorpus(corpus, range(50), 7, seed=3)
    first_tokens = {int(corpus.read(sequence)[0]) for sequence in range(50)}
    for index in range(2 * packed.samples_per_epoch):
        sample = packed.sample(index)
        assert [int(token) in first_tokens for token in sample.tokens] == sample.starts.tolist()


def test_splits_cover_every_document_once_in_order() -> None:
    assert split_ranges(1000, "969,30,1") == [range(969), range(969, 999), range(999, 1000)]


def test_an_index_that_was_changed_in_place_is_an_error(tmp_path: Path) -> None:
    """A page of the mapped index that was truncated away would end the process with SIGBUS."""
    corpus = IndexedCorpus(write(tmp_path / "c", [[1, 2, 3], [4, 5]]))
    packed = PackedCorpus(corpus, range(2), 2, seed=3)
    packed.sample(0)
    os.truncate(tmp_path / "c.idx", 10)
    with pytest.raises(DataError, match=r"c\.idx: changed since it was opened; write new pairs under another name"):
        packed.sample(0)


def test_an_index_that_was_replaced_by_another_file_can_still_be_read(tmp_path: Path) -> None:
    packed = PackedCorpus(IndexedCorpus(write(tmp_path / "c", [[1, 2, 3], [4, 5]])), range(2), 2, seed=3)
    before = packed.sample(0).tokens
    write(tmp_path / "c", [[6, 7, 8, 9]])
    assert np.array_equal(packed.sample(0).tokens, before)


def test_train_and_valid_of_a_split_share_no_document(prefix: str) -> None:
    datasets = build_datasets(DataConfig(paths=prefix, split="80,20,0"), 7)
    assert datasets.valid.keys() == {"eval"} and datasets.test is None
    train, valid = (
        {int(t) for i in range(d.samples_per_epoch) for t in d.sample(i).tokens}
        for d in (datasets.train, datasets.valid["eval"])
    )
    assert not train & valid


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p.with_suffix(".bin").unlink(), r"c.bin"),
        (lambda p: p.with_suffix(".idx").unlink(), r"c.idx"),
        (lambda p: p.with_suffix(".bin").write_bytes(p.with_suffix(".bin").read_bytes()[:-2]), "bytes"),
        (lambda p: p.with_suffix(".bin").write_bytes(p.with_suffix(".bin").read_bytes() * 2), "longer"),
        (lambda p: p.with_suffix(".idx").write_bytes(p.with_suffix(".idx").read_bytes()[:-9]), "c.idx"),
        (lambda p: p.with_suffix(".idx").write_bytes(b"foreign" * 10), "c.idx"),
    ],
)
def test_a_damaged_pair_is_an_error_that_names_the_file(tmp_path: Path, damage, message: str) -> None:
    write(tmp_path / "c", [[1, 2, 3], [4, 5]])
    damage(tmp_path / "c")
    with pytest.raises(DataError, match=message):
        IndexedCorpus(tmp_path / "c")


def test_missing_data_too_few_tokens_and_ids_above_the_vocabulary_are_refused(tmp_path: Path) -> None:
    short = write(tmp_path / "c", [[1, 2, 3]])
    with pytest.raises(DataError, match="too few for one sample"):
        build_datasets(DataConfig(train=short), 7)
    with pytest.raises(DataError, match="data.train: no training data"):
        build_datasets(DataConfig(), 7)
    with pytest.raises(DataError, match="token id 3, but the vocabulary has the ids 0 to 2"):
        check_vocabulary(DataConfig(train=short), 3)


def test_a_writer_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "c", np.dtype(np.uint16)) as writer:
        writer.add_document([1, 2])
        raise RuntimeError
    assert not list(tmp_path.iterdir())
