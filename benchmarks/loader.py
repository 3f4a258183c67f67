"""Measure how fast samples are read, and the share of a step that waits for them.

    python benchmarks/loader.py --sequence-length 2048 --batch 8 --step-seconds 0.1

Reads a corpus of random tokens (or --prefix) twice: cold, with its pages dropped from memory, and warm. The step that
waits is a loop of matrix products, which shares the machine with the loader as training does.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from megagpt.data.gpt_dataset import PackedCorpus
from megagpt.data.indexed import IndexedCorpus, IndexedWriter, files_of
from megagpt.data.prefetch import Prefetcher
from megagpt.data.sampler import GlobalBatches
from megagpt.training.trainer import PREFETCHED_BATCHES


def main() -> None:
    """Print samples per second and the share of time spent waiting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", help="prefix of a .bin/.idx pair with ids below 60000 (default: random tokens)")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens")
    parser.add_argument("--batch", type=int, default=8, help="samples per step of this rank")
    parser.add_argument("--step-seconds", type=float, default=0.1, help="computing time of a step")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prefix = args.prefix or write_corpus(Path(folder) / "c")
        packed = PackedCorpus(IndexedCorpus(prefix), range(len(IndexedCorpus(prefix).sizes)), args.sequence_length, 1)
        batches = GlobalBatches(packed, args.batch, args.batch, 0, 1, 60_000)
        drop_pages(prefix)
        for name in ("cold", "warm"):
            start = time.perf_counter()
            for step in range(args.steps):
                batches.micro_batches(step * args.batch)
            seconds = time.perf_counter() - start
            print(f"{name}: {args.steps * args.batch / seconds:,.0f} samples/s of {args.sequence_length} tokens", flush=True)
        drop_pages(prefix)
        print(f"waiting, cold: {wait_share(batches, args.steps, args.step_seconds):.2%} of {args.step_seconds} s steps")


def wait_share(batches: GlobalBatches, steps: int, step_seconds: float) -> float:
    """Return the share of time that the steps wait for their batches, without the first batch, which nothing can hide."""
    matrix = np.random.default_rng(0).standard_normal((256, 256))
    items = (batches.micro_batches((1000 + step) * batches.size) for step in range(steps))
    with Prefetcher(items, PREFETCHED_BATCHES) as prefetched:
        for number, _ in enumerate(prefetched):
            if number == 0:
                start, first_wait = time.perf_counter(), prefetched.seconds_waited
            end = time.perf_counter() + step_seconds
            while time.perf_counter() < end:
                matrix @ matrix
        return (prefetched.seconds_waited - first_wait) / (time.perf_counter() - start)


def write_corpus(prefix: Path, documents: int = 1_000_000) -> str:
    """Write 10^9 bytes of random tokens."""
    generator = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(20):
            sizes = generator.integers(1, 1000, documents // 20)
            writer.add_documents(generator.integers(0, 50_000, int(sizes.sum()), dtype=np.uint16), sizes)
    return str(prefix)


def drop_pages(prefix: str) -> None:
    """Ask the kernel to drop the pages of the .bin file from memory."""
    path, _ = files_of(prefix)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
