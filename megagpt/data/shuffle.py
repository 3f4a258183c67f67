"""The order of one epoch: documents shuffled and joined, the stream cut into samples, the samples shuffled."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Order(NamedTuple):
    """One epoch of a range of a corpus's sequences."""

    documents: npt.NDArray[np.unsignedinteger]
    """Numbers of the sequences within the range, in the epoch's order."""
    ends: npt.NDArray[np.int64]
    """Tokens of the epoch up to and with each of them."""
    samples: npt.NDArray[np.unsignedinteger]
    """Which piece of the stream each sample is."""


def epoch_order(sizes: npt.NDArray[np.int32], sequence_length: int, seed: int, epoch: int) -> Order:
    """The order that follows from `sizes`, the tokens of each sequence, and the numbers alone.

    Pieces overlap by one token, the last label of one being the first input of the next; what is left of the stream
    after the last whole one is not used in this epoch.
    """
    documents = permutation(len(sizes), seed, epoch, 0)
    ends = np.cumsum(sizes[documents], dtype=np.int64)
    return Order(documents, ends, permutation(samples_of(int(ends[-1]), sequence_length), seed, epoch, 1))


def samples_of(tokens: int, sequence_length: int) -> int:
    """Whole samples in a stream of `tokens`: each needs a token more than its length, for its last label."""
    return max(0, tokens - 1) // sequence_length


def permutation(n: int, *key: int) -> npt.NDArray[np.unsignedinteger]:
    """The numbers below `n` in an order that depends on `n` and `key` alone, on every machine and under every numpy.

    Sorts random numbers with n's bits below them: as fast as a sort of integers, without equals whose order a sort
    could choose. The numbers are the raw ones of Philox (Salmon et al. 2011), which numpy keeps as they are, while
    what its `permutation` makes of them may change (NEP 19).
    """
    bits = np.uint64(max(1, (n - 1).bit_length()))
    keys = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    keys <<= bits
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << bits) - np.uint64(1)
    return keys.astype(np.uint32 if n <= 2**32 else np.uint64)
