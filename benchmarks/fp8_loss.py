"""Losses of fp8 beside those of bf16: the same model, data and seed, on the CPU or on the GPU of the machine.

The text is the source code of Python's standard library, as bytes.

  OMP_NUM_THREADS=1 python benchmarks/fp8_loss.py --steps 300
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from megagpt.data.indexed import IndexedWriter

ROOT = Path(__file__).parents[1]
N_BYTES = 2_000_000
SHOWN = 6
"""Rows of the table."""


def main() -> None:
    """Print the mean losses of consecutive ranges of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "bytes")
        losses = {precision: run(Path(folder), precision, args.steps) for precision in ("bf16", "fp8")}
    length = args.steps // SHOWN
    for first in range(0, length * SHOWN, length):
        means = {precision: statistics.mean(values[first : first + length]) for precision, values in losses.items()}
        difference = means["fp8"] / means["bf16"] - 1
        both = f"bf16 {means['bf16']:.4f}  fp8 {means['fp8']:.4f}  ({difference:+.2%})"
        print(f"steps {first + 1:4d} to {first + length:4d}: {both}")


def write_corpus(prefix: Path) -> None:
    """Write bytes of Python's standard library as a token file with one document per module."""
    texts = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        n_written = 0
        for text in texts:
            if n_written > N_BYTES or not text:
                continue
            writer.add_documents(np.frombuffer(text, np.uint8).astype(np.uint16), [len(text)])
            n_written += len(text)


def run(folder: Path, precision: str, steps: int) -> list[float]:
    """Train in a process of its own and return the loss of each step."""
    metrics = folder / f"{precision}.jsonl"
    config: dict[str, Any] = {
        "model": {
            "n_layer": 4,
            "n_embd": 64,
            "n_head": 4,
            "n_positions": 64,
            "vocab_size": 256,
            "position_embedding": "rotary",
            "norm": "rmsnorm",
            "gated_mlp": True,
            "activation": "silu",
            "ffn_hidden": 176,
        },
        "data": {"train": str(folder / "bytes")},
        "training": {"steps": steps, "micro_batch_size": 8, "global_batch_size": 8, "precision": precision},
        "optimizer": {"learning_rate": 3e-3},
        "logging": {"interval": 1, "metrics_file": str(metrics)},
    }
    (folder / "run.json").write_text(json.dumps(config))
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), "--config", str(folder / "run.json")]
    subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, check=True)
    return [record["loss"] for record in map(json.loads, metrics.read_text().splitlines()) if "loss" in record]


if __name__ == "__main__":
    main()
