"""Span corruption and prefix language modelling, the objectives of T5 (Raffel et al., arXiv 1910.10683, section 3).

Span corruption: random spans of a piece of text are replaced by sentinels, and the target lists each sentinel with the tokens
of its span. Prefix language modelling: a piece is divided at a random place into source and target. What happens to a piece
depends on the seed and the number of the sample only, so that the samples are the same under every layout and after a resume.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.config.schema import DataConfig
from megagpt.data.encoder_samples import EncoderFormat, encoder_sample
from megagpt.data.gpt_dataset import Sample
from megagpt.data.tokenizer import Tokenizer, load_tokenizer, special_token_id
from megagpt.errors import ConfigError

_PURPOSE = 8
"""Part of the seed: makes these random numbers independent of those of other transforms."""
Tokens = npt.NDArray[np.int64]


class SpanLengths(NamedTuple):
    """Sizes of span corruption, equal for all samples."""

    text: int
    """Tokens of a piece of text."""
    noise: int
    """Tokens of it that are in spans."""
    spans: int

    @property
    def source(self) -> int:
        """Tokens of the source: the other tokens, a sentinel for each span, and the end."""
        return self.text - self.noise + self.spans + 1

    @property
    def target(self) -> int:
        """Tokens of the target: a sentinel for each span, its tokens, and the end."""
        return self.noise + self.spans + 1


def span_lengths(text: int, density: float, mean_length: float) -> SpanLengths:
    """Return the sizes for a piece of `text` tokens >= 2, rounded as T5 rounds them."""
    noise = min(max(round(text * density), 1), text - 1)
    spans = min(max(round(noise / mean_length), 1), noise, text - noise)
    return SpanLengths(text, noise, spans)


def largest_span_lengths(source: int, target: int, density: float, mean_length: float) -> SpanLengths | None:
    """Return the sizes of the largest piece whose source and target fit into so many tokens; None if none of 2 tokens does.

    T5: a source of 512 tokens is made of 568 tokens of text, and its target has 114 tokens.
    """
    low, high = 1, 2 * source + target  # both sizes grow with the piece
    while high - low > 1:
        middle = (low + high) // 2
        lengths = span_lengths(middle, density, mean_length)
        low, high = (middle, high) if lengths.source <= source and lengths.target <= target else (low, middle)
    return span_lengths(low, density, mean_length) if low >= 2 else None


class SpanCorruption:
    """Transforms pieces of text into sources with sentinels and their targets."""

    def __init__(
        self, lengths: SpanLengths, sentinels: Tokens, end: int, length: int, encoder: EncoderFormat, seed: int
    ) -> None:
        """`sentinels`: at least one for each span; `end`: end-of-document token; `length`: positions of the decoder."""
        self._lengths = lengths
        self._sentinels = sentinels[: lengths.spans]
        self._end = end
        self._length = length
        self._encoder = encoder
        self._seed = seed

    def __call__(self, sample: Sample, index: int) -> Sample:
        """Return sample `index` of a corpus, corrupted. `sample`: the piece, and one token more, which is not used."""
        text, noise, spans = self._lengths
        numbers = _random(self._seed, index, text)
        kept = _composition(text - noise, spans, numbers[: text - noise])
        lost = _composition(noise, spans, numbers[text - noise :])
        bounds = np.cumsum(np.stack([kept, lost], 1).ravel())  # a kept piece comes first
        pieces = np.split(sample.tokens[:text], bounds[:-1])
        source: list[Tokens] = []
        target: list[Tokens] = []
        for sentinel, before, span in zip(np.split(self._sentinels, spans), pieces[::2], pieces[1::2], strict=True):
            source += [before, sentinel]
            target += [sentinel, span]
        end = np.array([self._end])
        return encoder_sample(np.concatenate([*source, end]), np.concatenate([*target, end]), self._length, self._encoder)


class PrefixLM:
    """Divides pieces of text at random into a source and its continuation, each with an end-of-document token."""

    def __init__(self, end: int, length: int, encoder: EncoderFormat, seed: int) -> None:
        """`length`: positions of the decoder."""
        self._end = end
        self._length = length
        self._encoder = encoder
        self._seed = seed

    def __call__(self, sample: Sample, index: int) -> Sample:
        """Return sample `index`. `sample`: as many tokens as the encoder has positions, and one more, which is not used."""
        text, ends = self._encoder.positions, [self._end]
        first = max(1, text - (self._length - 1))  # the target must fit as well
        cut = first + int(_random(self._seed, index, 1)[0] % np.uint64(text - first))
        source, target = np.split(sample.tokens[:text], [cut])
        return encoder_sample(np.append(source, ends), np.append(target, ends), self._length, self._encoder)


def build_span_corruption(data: DataConfig, length: int, encoder: EncoderFormat) -> tuple[SpanCorruption, int]:
    """Return the transform, and the length of a piece. Raises ConfigError if the lengths or the sentinels do not suffice."""
    settings = data.span_corruption
    lengths = largest_span_lengths(encoder.positions, length, settings.density, settings.mean_length)
    if lengths is None:
        raise ConfigError(
            f"model.encoder_positions: {encoder.positions} (and model.n_positions {length}) have no room for a corrupted piece "
            "of text; expected at least 4"
        )
    tokenizer = _tokenizer(data)
    sentinels = sentinel_ids(data, tokenizer)
    if len(sentinels) < lengths.spans:
        raise ConfigError(
            f"data.span_corruption.sentinels: {len(sentinels)} are too few for the {lengths.spans} spans of a source of "
            f"{encoder.positions} tokens; expected at least {lengths.spans}, or a larger mean_length"
        )
    return SpanCorruption(lengths, sentinels, tokenizer.eod_id, length, encoder, data.seed), lengths.text


def build_prefix_lm(data: DataConfig, length: int, encoder: EncoderFormat) -> tuple[PrefixLM, int]:
    """Return the transform, and the length of a piece. Raises ConfigError if the lengths have no room."""
    if min(encoder.positions, length) < 2:
        raise ConfigError(
            f"model.encoder_positions: {encoder.positions} and model.n_positions {length} have no room for a token and the "
            "end; expected at least 2 each"
        )
    return PrefixLM(_tokenizer(data).eod_id, length, encoder, data.seed), encoder.positions


def sentinel_ids(data: DataConfig, tokenizer: Tokenizer) -> Tokens:
    """Return the ids of the sentinels, in the order of their use.

    They are the tokenizer's tokens <extra_id_0>, <extra_id_1>, ... if it has them. Else they follow its ids, and the first
    sentinel has the last id, as in T5.
    """
    count = data.span_corruption.sentinels
    named = [special_token_id(tokenizer, f"<extra_id_{number}>") for number in range(count)]
    if named[0] is None:
        return tokenizer.vocab_size + np.arange(count)[::-1]
    missing = named.index(None) if None in named else count
    return np.array(named[:missing], np.int64)


def required_vocab_size(data: DataConfig, tokenizer: Tokenizer) -> int:
    """Return the number of ids in the vocabulary: those of the tokenizer, and sentinels if the model has an encoder.

    Fine-tuning on pairs uses no sentinel, but continues a model that has them.
    """
    sentinels = sentinel_ids(data, tokenizer).max() + 1 if data.needs_encoder else 0
    return max(tokenizer.vocab_size, int(sentinels))


def _tokenizer(data: DataConfig) -> Tokenizer:
    assert data.tokenizer is not None, "a rule of the config requires it"
    return load_tokenizer(data.tokenizer)


def _random(seed: int, index: int, count: int) -> npt.NDArray[np.uint64]:
    return np.random.Philox(np.random.SeedSequence((seed, _PURPOSE, index))).random_raw(count)


def _composition(total: int, parts: int, numbers: npt.NDArray[np.uint64]) -> Tokens:
    """Divide `total` into `parts` positive numbers, each division equally likely. `numbers`: at least total - 1 random ones."""
    cuts = np.sort(np.argsort(numbers[: total - 1], kind="stable")[: parts - 1]) + 1
    return np.diff(np.concatenate(([0], cuts, [total])))
