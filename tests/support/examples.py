"""Examples for fine-tuning as token files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megagpt.data.examples import mask_prefix
from megagpt.data.indexed import IndexedWriter

Example = tuple[list[int], list[int]]
"""Token ids, and 1 for each that is learned."""


def write_examples(prefix: Path, examples: Sequence[Sequence[Example]]) -> str:
    """Write examples of one or two sequences each, and their mask; return the prefix."""
    with IndexedWriter(mask_prefix(str(prefix)), np.uint8) as mask, IndexedWriter(prefix, np.uint16) as tokens:
        for sequences in examples:
            tokens.add_document(*([ids for ids, _ in sequences]))
            mask.add_document(*([learned for _, learned in sequences]))
    return str(prefix)


def random_example(generator: np.random.Generator, length: int, vocab_size: int = 61) -> Example:
    """Return random tokens, of which those behind a prompt of random length are learned."""
    prompt = int(generator.integers(1, length))
    return generator.integers(0, vocab_size, length).tolist(), [0] * prompt + [1] * (length - prompt)


def random_examples(prefix: Path, sizes: Sequence[int], seed: int = 0) -> str:
    """Write one random example of each size."""
    generator = np.random.default_rng(seed)
    return write_examples(prefix, [[random_example(generator, size)] for size in sizes])
