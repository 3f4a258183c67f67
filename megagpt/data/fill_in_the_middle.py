"""Fill-in-the-middle (Bavarian et al., arXiv 2207.14255): move the middle of a document to its end.

A document becomes PREFIX prefix SUFFIX suffix MIDDLE middle (PSM), or PREFIX SUFFIX suffix MIDDLE prefix middle (SPM, their
second variant). The text is cut at two random places between tokens. The transform works on the pieces of documents in a
sample, so no document is mixed with another, and a piece keeps its length: its last three tokens before the end-of-document
token make room for the three special tokens.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megagpt.config.schema import DataConfig
from megagpt.data.gpt_dataset import Sample
from megagpt.data.tokenizer import Tokenizer, load_tokenizer, special_token_id
from megagpt.errors import ConfigError

MIN_TOKENS = 8
"""Shorter pieces of a document stay as they are."""
_PURPOSE = 7
"""Part of the seed: makes these random numbers independent of those of the shuffle."""
_NUMBERS_PER_PIECE = 4


class MiddleTokens(NamedTuple):
    """Ids of the special tokens."""

    prefix: int
    middle: int
    suffix: int


class FillInTheMiddle:
    """Transforms samples; what happens to a sample depends on the seed and its number only."""

    def __init__(self, rate: float, spm_share: float, tokens: MiddleTokens, end: int, seed: int) -> None:
        """`rate`: share of the documents; `spm_share`: share of these in SPM order; `end`: id of the end-of-document token."""
        self._rate = rate
        self._spm_share = spm_share
        self._tokens = tokens
        self._end = end
        self._seed = seed

    def __call__(self, sample: Sample, index: int) -> Sample:
        """Return sample `index` of a corpus with some of its documents transformed."""
        tokens = sample.tokens.copy()
        bounds = np.unique([0, *np.flatnonzero(sample.starts), len(tokens)])
        seeds = np.random.SeedSequence((self._seed, _PURPOSE, index))
        raw = np.random.Philox(seeds).random_raw(_NUMBERS_PER_PIECE * (len(bounds) - 1))
        numbers = (raw >> np.uint64(11)).astype(np.float64).reshape(-1, _NUMBERS_PER_PIECE) * 2.0**-53  # in [0, 1)
        for start, stop, row in zip(bounds[:-1], bounds[1:], numbers, strict=True):
            stop = stop - 1 if tokens[stop - 1] == self._end else stop
            if stop - start >= MIN_TOKENS and row[0] < self._rate:
                tokens[start:stop] = self._transformed(tokens[start:stop], row[1:])
        return sample._replace(tokens=tokens)

    def _transformed(self, piece: npt.NDArray[np.int64], numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Return a piece of the same length. `numbers`: three in [0, 1), for the order and the two cuts."""
        text = piece[: len(piece) - len(self._tokens)]
        first, second = np.sort((numbers[1:] * (len(text) + 1)).astype(np.int64))
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        ids = self._tokens
        if numbers[0] < self._spm_share:
            return np.concatenate(([ids.prefix, ids.suffix], suffix, [ids.middle], prefix, middle))
        return np.concatenate(([ids.prefix], prefix, [ids.suffix], suffix, [ids.middle], middle))


def build_fill_in_the_middle(data: DataConfig) -> FillInTheMiddle | None:
    """Return the transform of the config, or None for a rate of 0. Raises ConfigError for tokens that do not exist."""
    fim = data.fill_in_the_middle
    if fim.rate == 0 or data.tokenizer is None:
        return None
    tokenizer = load_tokenizer(data.tokenizer)
    ids = [token if isinstance(token, int) else _id_of(token, tokenizer, data.tokenizer) for token in fim.tokens]
    return FillInTheMiddle(fim.rate, fim.spm_share, MiddleTokens(*ids), tokenizer.eod_id, data.seed)


def _id_of(text: str, tokenizer: Tokenizer, name: str) -> int:
    found = special_token_id(tokenizer, text)
    if found is not None:
        return found
    raise ConfigError(
        f"data.fill_in_the_middle.tokens: {text} is not a special token of data.tokenizer {name}; name its tokens for prefix, "
        "middle and suffix, or three ids that the data does not use, below model.vocab_size"
    )
