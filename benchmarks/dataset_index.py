"""How fast a training dataset opens: 10 million documents, 5 billion tokens, against a plain loop compiled by numba.

    pip install numba
    python benchmarks/dataset_index.py --documents 10000000

The loop does what Megatron's C++ helper does: it walks the shuffled documents and notes where each sample begins.
The .bin is a sparse file: its size counts here, not its content.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data.gpt_dataset import PackedCorpus
from megagpt.data.indexed import IndexedCorpus, IndexedWriter
from megagpt.data.shuffle import epoch_order


def main() -> None:
    """Print seconds and bytes of each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--mean-tokens", type=int, default=500, help="tokens in a document, on average")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--folder", help="where the corpus of 1.2 GB on disk is made (default: the temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_corpus(Path(folder) / "c", args.documents, args.mean_tokens)
        before = peak_bytes()
        corpus = timed("open and check the pair", lambda: IndexedCorpus(Path(folder) / "c"))
        tokens = f"{corpus.n_tokens / 1e9:.2f} billion tokens"
        for name in ("first start, order built and kept", "second start, order found"):
            packed = timed(name, lambda: opened(corpus, args.sequence_length))
        print(f"peak of memory: {(peak_bytes() - before) / 1e9:.2f} GB above the start's {before / 1e9:.2f} GB; {tokens}")
        timed("1000 samples", lambda: [packed.sample(index) for index in range(1000)])
        timed("the order alone, in memory", lambda: epoch_order(corpus.sizes, args.sequence_length, 1234, 0))
        compare_with_numba(corpus, args.sequence_length)


def opened(corpus: IndexedCorpus, sequence_length: int) -> PackedCorpus:
    """A dataset whose first sample has been read."""
    packed = PackedCorpus(corpus, range(len(corpus.sizes)), sequence_length, 1234)
    packed.sample(0)
    return packed


def write_corpus(prefix: Path, documents: int, mean_tokens: int) -> None:
    """A pair whose .bin is a hole of the right size."""
    sizes = np.random.default_rng(0).integers(1, 2 * mean_tokens, documents).astype(np.int32)
    writer = IndexedWriter(prefix, np.uint16)
    writer._files["tokens"].truncate(2 * int(sizes.sum(dtype=np.int64)))
    writer.n_tokens = int(sizes.sum(dtype=np.int64))
    writer._files["sizes"].write(sizes.data)
    writer._files["documents"].write(np.arange(1, documents + 1, dtype=np.int64).data)
    writer.n_sequences = writer.n_documents = documents
    writer.close()
    writer.discard()


def compare_with_numba(corpus: IndexedCorpus, sequence_length: int) -> None:
    """Time the loop, compiled before."""
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
                if remaining <= 0:  # the next sample begins at this one's last token
                    offset += remaining + left - 1
                    remaining = 0
                else:
                    document += 1
                    offset = 0
            index[sample, 0], index[sample, 1] = document, offset
        return index

    sample_index(corpus.sizes[:10], np.arange(10), 1, 2)
    samples = (corpus.n_tokens - 1) // sequence_length

    def plain() -> None:
        generator = np.random.RandomState(1234)
        documents = np.arange(len(corpus.sizes), dtype=np.int32)
        generator.shuffle(documents)
        sample_index(corpus.sizes, documents, sequence_length, samples)
        generator.shuffle(np.arange(samples))

    timed("shuffles by numpy and the plain loop by numba", plain)


def timed(name: str, run: Callable[[], Any]) -> Any:
    """Run it, print its seconds."""
    start = time.perf_counter()
    result = run()
    print(f"{name}: {time.perf_counter() - start:.3f} s", flush=True)
    return result


def peak_bytes() -> int:
    """Of this process's memory so far, with what it has mapped."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
