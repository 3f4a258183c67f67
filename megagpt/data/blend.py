"""The datasets that a config names, and several corpora mixed into one stream."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from megagpt.config.schema import DataConfig, Source
from megagpt.data.encoder_samples import EncoderFormat
from megagpt.data.examples import ExampleCorpus, LabelledExamples, PackedExamples
from megagpt.data.fill_in_the_middle import build_fill_in_the_middle
from megagpt.data.gpt_dataset import PackedCorpus, Sample, TooShortError, Transform
from megagpt.data.indexed import MAX_CHECKED_BYTES, IndexedCorpus, check_corpus
from megagpt.data.interleave import Interleave
from megagpt.data.pairs import SEQUENCES_PER_PAIR, Pairs
from megagpt.data.span_corruption import build_prefix_lm, build_span_corruption
from megagpt.errors import DataError

PARTS = ("train", "valid", "test")
"""The shares of data.split, in its order."""


class Dataset(Protocol):
    """An endless list of samples."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples until every token has been seen about once."""

    @property
    def unrepeated_samples(self) -> int:
        """Samples before the first one that contains a piece of text for the second time."""

    def sample(self, index: int) -> Sample:
        """Return sample `index` >= 0."""


class Datasets(NamedTuple):
    """The datasets of a run."""

    train: Dataset
    valid: dict[str, Dataset]
    """Validation data by the name of its metrics: "eval", or "eval_NAME" for each of several sets; may be empty."""
    test: Dataset | None

    @property
    def all(self) -> list[Dataset]:
        """All of them."""
        return [self.train, *self.valid.values(), *([] if self.test is None else [self.test])]


class OpenCorpus(Protocol):
    """A corpus of any task, opened."""

    @property
    def n_documents(self) -> int:
        """Documents that a split divides."""

    def dataset(self, documents: range, sequence_length: int, transform: Transform | None = None) -> Dataset:
        """Return a range of the documents as samples, each changed by `transform`. Raises TooShortError without a sample."""


class TextCorpus:
    """A corpus whose tokens are one stream."""

    def __init__(self, prefix: str, data: DataConfig) -> None:
        self._corpus = IndexedCorpus(prefix)
        self._data = data
        self.n_documents = len(self._corpus.sizes)

    def dataset(self, documents: range, sequence_length: int, transform: Transform | None = None) -> Dataset:
        cache_dir = Path(self._data.cache_dir) if self._data.cache_dir else None
        return PackedCorpus(self._corpus, documents, sequence_length, self._data.seed, cache_dir, transform)


class TaskCorpus:
    """A corpus of examples."""

    def __init__(
        self,
        prefix: str,
        data: DataConfig,
        sequences_per_example: int = 1,
        packed: type[PackedExamples] = PackedExamples,
    ) -> None:
        """`packed`: how samples are made of the examples."""
        self._corpus = ExampleCorpus(prefix, sequences_per_example)
        self._data = data
        self._packed = packed
        self.n_documents = len(self._corpus.lengths)

    def dataset(self, documents: range, sequence_length: int, transform: Transform | None = None) -> Dataset:
        return self._packed(self._corpus, documents, sequence_length, self._data)


class EncoderTextCorpus:
    """A corpus whose tokens are one stream, of which a transform makes sources and targets."""

    def __init__(
        self,
        prefix: str,
        data: DataConfig,
        encoder: EncoderFormat,
        build: Callable[[DataConfig, int, EncoderFormat], tuple[Transform, int]],
    ) -> None:
        """`build`: returns the transform, and the length of the pieces that it gets."""
        self._corpus = TextCorpus(prefix, data)
        self._build = lambda length: build(data, length, encoder)
        self.n_documents = self._corpus.n_documents

    def dataset(self, documents: range, sequence_length: int, transform: Transform | None = None) -> Dataset:
        corrupted, piece = self._build(sequence_length)
        return self._corpus.dataset(documents, piece, corrupted)


class PairCorpus:
    """A corpus of sources and targets."""

    def __init__(self, prefix: str, data: DataConfig, encoder: EncoderFormat) -> None:
        self._corpus = ExampleCorpus(prefix, SEQUENCES_PER_PAIR)
        self._data = data
        self._encoder = encoder
        self.n_documents = len(self._corpus.lengths)

    def dataset(self, documents: range, sequence_length: int, transform: Transform | None = None) -> Dataset:
        return Pairs(self._corpus, documents, sequence_length, self._data, self._encoder)


CORPORA: dict[str, Callable[[str, DataConfig], OpenCorpus]] = {
    "text": TextCorpus,
    "chat": TaskCorpus,
    "preference": partial(TaskCorpus, sequences_per_example=2),
    "classification": partial(TaskCorpus, packed=LabelledExamples),
}
"""data.task -> how a prefix is opened."""
ENCODER_CORPORA: dict[str, Callable[[str, DataConfig, EncoderFormat], OpenCorpus]] = {
    "span_corruption": partial(EncoderTextCorpus, build=build_span_corruption),
    "prefix_lm": partial(EncoderTextCorpus, build=build_prefix_lm),
    "pairs": PairCorpus,
}
"""The same for the tasks of a model with an encoder."""


class Blend:
    """Corpora mixed by weight: at every position of the stream each corpus has given its share, within one sample."""

    def __init__(self, corpora: Sequence[Dataset], weights: Sequence[float]) -> None:
        """Raises DataError if a weight is too small a share."""
        self.corpora = corpora
        try:
            self._interleave = Interleave(weights)
        except ValueError as error:
            raise DataError(f"data: weights {', '.join(f'{weight:g}' for weight in weights)}: {error}; leave it out") from None
        self.samples_per_epoch = sum(corpus.samples_per_epoch for corpus in corpora)

    @property
    def unrepeated_samples(self) -> int:
        """Samples before the first corpus starts again."""
        return min(
            self._interleave.first_position(number, corpus.unrepeated_samples) for number, corpus in enumerate(self.corpora)
        )

    def samples_of_each(self, n_samples: int) -> list[int]:
        """Return how many of the first `n_samples` samples come from each corpus."""
        return self._interleave.counts(n_samples)

    def sample(self, index: int) -> Sample:
        """Return sample `index` >= 0."""
        corpus, corpus_index = self._interleave.at(index)
        return self.corpora[corpus].sample(corpus_index)


def build_datasets(data: DataConfig, sequence_length: int, encoder: EncoderFormat | None = None) -> Datasets:
    """Open the datasets of `data`. `encoder`: for the tasks of a model with an encoder.

    Raises DataError if files are missing, damaged or too short, and if there is no training data.
    """
    transforms = (build_fill_in_the_middle(data), None, None)  # evaluations read the text as it is
    if data.paths is not None and data.split is not None:
        corpora = _open(data, data.paths, encoder)  # once: an index of many documents takes a while to check
        parts = [_split_dataset(data.paths, corpora, data.split, part, sequence_length, transforms[part]) for part in range(3)]
        train, test = parts[0], parts[2]
        valid = {} if parts[1] is None else {"eval": parts[1]}
    else:
        train, test = (
            None if source is None else _full_dataset(data, source, sequence_length, encoder, transform)
            for source, transform in ((data.train, transforms[0]), (data.test, transforms[2]))
        )
        valid = {name: _full_dataset(data, source, sequence_length, encoder) for name, source in data.valid_sets.items()}
    if train is None:
        raise DataError("data.train: no training data; set it to the prefix of a .bin/.idx pair, or set data.paths and split")
    return Datasets(train, valid, test)


def split_ranges(n_sequences: int, split: str) -> list[range]:
    """Return the contiguous ranges of train, valid and test, rounded as Megatron does."""
    shares = [float(share) for share in split.split(",")]
    bounds = np.cumsum([0.0, *shares]) / sum(shares) * n_sequences
    cuts = [round(float(bound)) for bound in bounds]
    return [range(cuts[part], cuts[part + 1]) for part in range(3)]


def check_vocabulary(data: DataConfig, vocab_size: int) -> None:
    """Raise DataError if a corpus has a token id outside the vocabulary.

    Large corpora are checked in part, as `indexed.check_corpus` describes. The total that is read does not depend on the
    number of corpora, because the other ranks wait meanwhile.
    """
    prefixes = list(dict.fromkeys(prefix for source in data.sources.values() for prefix in _prefixes(source)))
    for prefix in prefixes:
        check_corpus(IndexedCorpus(prefix), vocab_size, MAX_CHECKED_BYTES // len(prefixes))


def _split_dataset(
    source: Source,
    corpora: Sequence[OpenCorpus],
    split: str,
    part: int,
    sequence_length: int,
    transform: Transform | None,
) -> Dataset | None:
    if float(split.split(",")[part]) == 0:
        return None
    ranges = [split_ranges(corpus.n_documents, split)[part] for corpus in corpora]
    try:
        packed = [
            corpus.dataset(documents, sequence_length, transform) for corpus, documents in zip(corpora, ranges, strict=True)
        ]
    except TooShortError as error:
        raise DataError(
            f"data.split {split}: {PARTS[part]}: {error}; a split is by documents: use more or shorter documents (text files: "
            "preprocess_data.py --text-separator), or other shares"
        ) from None
    return _blend(packed, source)


def _full_dataset(
    data: DataConfig,
    source: Source,
    sequence_length: int,
    encoder: EncoderFormat | None,
    transform: Transform | None = None,
) -> Dataset:
    corpora = _open(data, source, encoder)
    return _blend([corpus.dataset(range(corpus.n_documents), sequence_length, transform) for corpus in corpora], source)


def _open(data: DataConfig, source: Source, encoder: EncoderFormat | None) -> list[OpenCorpus]:
    if encoder is not None:
        return [ENCODER_CORPORA[data.task](prefix, data, encoder) for prefix in _prefixes(source)]
    return [CORPORA[data.task](prefix, data) for prefix in _prefixes(source)]


def _blend(corpora: Sequence[Dataset], source: Source) -> Dataset:
    return Blend(corpora, list(source.values())) if isinstance(source, dict) and len(corpora) > 1 else corpora[0]


def _prefixes(source: Source) -> list[str]:
    return [source] if isinstance(source, str) else list(source)
