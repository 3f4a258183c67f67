"""Measure how fast a training dataset opens: 10 million documents, 5 billion tokens; compare with a loop compiled by numba.

    pip install numba
    python benchmarks/dataset_index.py --documents 10000000

The loop does what Megatron's C++ helper does: it goes through the shuffled documents and records where each sample starts.
The .bin is a sparse file, because only its size matters here.
"""

import argparse
import os
import resource
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data.gpt_dataset import PackedCorpus
from megagpt.data.indexed import MAGIC, VERSION, IndexedCorpus, files_of
from megagpt.data.shuffle import epoch_order

UINT16_CODE = 8
"""Megatron's code of the token type uint16."""


def main() -> None:
    """Print the seconds of each step and the peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--mean-tokens", type=int, default=500, help="mean tokens per document")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--folder", help="folder for the corpus, 0.3 GB on disk (default: the temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_corpus(Path(folder) / "c", args.documents, args.mean_tokens)
        before = peak_bytes()
        corpus = timed("open and check the pair", lambda: IndexedCorpus(Path(folder) / "c"))
        tokens = f"{corpus.n_tokens / 1e9:.2f} billion tokens"
        for name in ("first start, order built and stored", "second start, order loaded"):
            packed = timed(name, lambda: open_dataset(corpus, args.sequence_length))
        print(f"peak memory: {(peak_bytes() - before) / 1e9:.2f} GB above the {before / 1e9:.2f} GB at the start; {tokens}")
        timed("1000 samples", lambda: [packed.sample(index) for index in range(1000)])
        timed("order only, in memory", lambda: epoch_order(corpus.sizes, args.sequence_length, 1234, 0))
        compare_with_numba(corpus, args.sequence_length)


def open_dataset(corpus: IndexedCorpus, sequence_length: int) -> PackedCorpus:
    """Return a dataset whose first sample was read."""
    packed = PackedCorpus(corpus, range(len(corpus.sizes)), sequence_length, 1234)
    packed.sample(0)
    return packed


def write_corpus(prefix: Path, documents: int, mean_tokens: int) -> None:
    """Write a pair whose .bin is a sparse file of uint16 tokens."""
    sizes = np.random.default_rng(0).integers(1, 2 * mean_tokens, documents).astype(np.int32)
    ends = 2 * np.cumsum(sizes, dtype=np.int64)
    bin_path, idx_path = files_of(prefix)
    bin_path.touch()
    os.truncate(bin_path, int(ends[-1]))
    with idx_path.open("wb") as index:
        index.write(struct.pack("<9sQBQQ", MAGIC, VERSION, UINT16_CODE, documents, documents + 1))
        index.write(sizes.data)
        index.write((ends - 2 * sizes).data)
        index.write(np.arange(documents + 1, dtype=np.int64).data)


def compare_with_numba(corpus: IndexedCorpus, sequence_length: int) -> None:
    """Time the loop, without its compilation."""
    try:
        import numba
    except ImportError:
        print("numba is not installed: no comparison")
        return

    @numba.njit
    def sample_index(sizes: Any, documents: Any, sequence_length: int, samples: int) -> Any:
        index = np.empty((samples + 1, 2), np.int64)
        index[0] = 0
        document, offset = 0, 0
        for sample in range(1, samples + 1):
            remaining = sequence_length + 1
            while remaining > 0:
                left = sizes[documents[document]] - offset
                remaining -= left
                if remaining <= 0:  # the next sample starts at the last token of this one
                    offset += remaining + left - 1
                    remaining = 0
                else:
                    document += 1
                    offset = 0
            index[sample, 0], index[sample, 1] = document, offset
        return index

    sample_index(corpus.sizes[:10], np.arange(10), 1, 2)
    samples = (corpus.n_tokens - 1) // sequence_length

    def numba_loop() -> None:
        generator = np.random.RandomState(1234)
        documents = np.arange(len(corpus.sizes), dtype=np.int32)
        generator.shuffle(documents)
        sample_index(corpus.sizes, documents, sequence_length, samples)
        generator.shuffle(np.arange(samples))

    timed("shuffles by numpy and the loop by numba", numba_loop)


def timed(name: str, run: Callable[[], Any]) -> Any:
    """Run `run`, print its seconds and return its result."""
    start = time.perf_counter()
    result = run()
    print(f"{name}: {time.perf_counter() - start:.3f} s", flush=True)
    return result


def peak_bytes() -> int:
    """Return the peak memory of this process so far, including mapped pages."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
