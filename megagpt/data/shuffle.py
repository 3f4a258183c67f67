"""The order of one epoch: shuffle and join the documents, cut the stream into samples, shuffle the samples."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class EpochOrder(NamedTuple):
    """The order of one epoch over a range of a corpus's sequences."""

    documents: npt.NDArray[np.unsignedinteger]
    """Indices of the sequences within the range, in shuffled order."""
    ends: npt.NDArray[np.int64]
    """Cumulative number of tokens, up to and including each of them."""
    samples: npt.NDArray[np.unsignedinteger]
    """Position of each sample in the stream, in units of the sequence length."""


def epoch_order(sizes: npt.NDArray[np.int32], sequence_length: int, seed: int, epoch: int) -> EpochOrder:
    """Return the order that follows from the arguments only. `sizes`: tokens of each sequence.

    Samples overlap by one token: the last label of one is the first input of the next. Tokens after the last full sample
    are not used in this epoch.
    """
    documents = permutation(len(sizes), seed, epoch, 0)
    ends = np.cumsum(sizes[documents], dtype=np.int64)
    return EpochOrder(documents, ends, permutation(count_samples(int(ends[-1]), sequence_length), seed, epoch, 1))


def count_samples(tokens: int, sequence_length: int) -> int:
    """Return the number of full samples in a stream of `tokens`; each needs one more token than its length, as last label."""
    return max(0, tokens - 1) // sequence_length


def permutation(n: int, *key: int) -> npt.NDArray[np.unsignedinteger]:
    """Return the numbers below `n` in an order that depends on `n` and `key` only, on every machine and numpy version.

    Sorts random numbers that contain each n in their low bits: as fast as sorting integers, and without ties. The random
    numbers are the raw output of Philox (Salmon et al. 2011), which numpy guarantees to keep; the result of numpy's own
    `permutation` may change between versions (NEP 19).
    """
    bits = np.uint64(max(1, (n - 1).bit_length()))
    keys = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    keys <<= bits
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << bits) - np.uint64(1)
    return keys.astype(np.uint32 if n <= 2**32 else np.uint64)
