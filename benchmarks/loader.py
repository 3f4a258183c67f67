"""How fast samples are read, and what share of a step is spent waiting for them.

    python benchmarks/loader.py --sequence-length 2048 --batch 8 --step-seconds 0.1

Reads a corpus of random tokens that is made for it (or --prefix), cold, its pages dropped from memory, and warm. The
step that waits is a loop of matrix products, which share the machine with the loader as training does.
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
from megagpt.training.trainer import BATCHES_AHEAD


def main() -> None:
    """Print samples per second and the share of time waited."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", help="of a .bin/.idx pair with ids below 60000")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens")
    parser.add_argument("--batch", type=int, default=8, help="samples of this rank in a step")
    parser.add_argument("--step-seconds", type=float, default=0.1, help="length of a step's computing")
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
                batches.at(step * args.batch)
            seconds = time.perf_counter() - start
            print(f"{name}: {args.steps * args.batch / seconds:,.0f} samples/s of {args.sequence_length} tokens", flush=True)
        drop_pages(prefix)
        print(f"waiting, cold: {waiting(batches, args.steps, args.step_seconds):.2%} of {args.step_seconds} s steps")


def waiting(batches: GlobalBatches, steps: int, step_seconds: float) -> float:
    """Share of the time that `steps` steps wait for their batches; the first one, which nothing could hide, aside."""
    a = np.random.default_rng(0).standard_normal((256, 256))
    with Prefetcher((batches.at((1000 + step) * batches.size) for step in range(steps)), BATCHES_AHEAD) as ready:
        for number, _ in enumerate(ready):
            if number == 0:
                start, first = time.perf_counter(), ready.seconds_waited
            end = time.perf_counter() + step_seconds
            while time.perf_counter() < end:
                a @ a
        return (ready.seconds_waited - first) / (time.perf_counter() - start)


def write_corpus(prefix: Path, documents: int = 1_000_000) -> str:
    """A gigabyte of random tokens."""
    generator = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(20):
            sizes = generator.integers(1, 1000, documents // 20)
            writer.add_documents(generator.integers(0, 50_000, int(sizes.sum()), dtype=np.uint16), sizes)
    return str(prefix)


def drop_pages(prefix: str) -> None:
    """Forget what of the .bin is in memory, as far as the kernel agrees."""
    path, _ = files_of(prefix)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
