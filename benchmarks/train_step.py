"""Our whole training step against Hugging Face's GPT-2, one process, same shape, alternating runs, ratio of medians.

Ours goes through the real engine and loop: data from a memory-mapped corpus, DeepSpeed ZeRO-1, clipping, fused AdamW, a
log line every step. Theirs is GPT2LMHeadModel with torch's fused AdamW and clip_grad_norm_, on a batch already in memory.
Seconds per step; shape as in the options (12 layers, 256 wide, 8 heads, vocabulary 32,000, 8 x 256 tokens by default).

  OMP_NUM_THREADS=1 python benchmarks/train_step.py --threads 1
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch

from megagpt.config import Config, build_config
from megagpt.data.blend import build_datasets
from megagpt.data.indexed import IndexedWriter
from megagpt.distributed.launcher import Launcher
from megagpt.distributed.process_group import start
from megagpt.parallel.topology import Topology
from megagpt.training.micro_batches import global_batches
from megagpt.training.trainer import Batch, Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of one process")
    parser.add_argument("--rounds", type=int, default=8, help="alternating steps counted of each, after two not counted")
    args = parser.parse_args()
    device, _ = start(Launcher())
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = shape(folder)
        steps = {"megagpt": our_step(config, device), "Hugging Face": their_step(config)}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(args.rounds + 2):
            for name, step in steps.items():
                begin = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - begin)
    tokens = config.training.global_batch_size * config.model.n_positions
    medians = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    for name, median in medians.items():
        counted = seconds[name][2:]
        spread = f"{min(counted):.3f} to {max(counted):.3f}"
        print(f"{name:13s} {median:.3f} s/step ({spread}), {tokens / median:.0f} tokens/s")
    print(f"ratio of medians: {medians['Hugging Face'] / medians['megagpt']:.2f} with {args.threads} thread(s)")


def shape(folder: str) -> Config:
    """The config of the comparison, over random tokens."""
    with IndexedWriter(f"{folder}/random", np.dtype(np.uint16)) as writer:
        writer.add_documents(np.random.default_rng(0).integers(0, 32000, 200_000).astype(np.uint16), [200_000])
    model = {"n_layer": 12, "n_embd": 256, "n_head": 8, "n_positions": 256, "vocab_size": 32000, "activation": "gelu_tanh"}
    return build_config(
        {
            "model": model,
            "data": {"train": f"{folder}/random"},
            "training": {"steps": 1000, "micro_batch_size": 8, "global_batch_size": 8},
            "logging": {"interval": 1, "metrics_file": f"{folder}/metrics.jsonl"},
        }
    )


def our_step(config: Config, device: torch.device) -> Callable[[], None]:
    """One turn of the trainer's loop."""
    with redirect_stdout(StringIO()):
        trainer = Trainer(config, Topology.create(1, 1), build_datasets(config.data, config.model.n_positions), device)
    batches = global_batches(trainer.datasets.train, config, trainer.topology, config.training.micro_batch_size)

    def step() -> None:
        with redirect_stdout(StringIO()):
            trainer.advance(Batch(trainer.samples, batches.size, batches.at(trainer.samples)))

    return step


def their_step(config: Config) -> Callable[[], None]:
    """Hugging Face's model, plainly trained."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model_config = config.model
    theirs = GPT2Config(
        vocab_size=model_config.tokens_in_vocab,
        n_positions=model_config.n_positions,
        n_embd=model_config.n_embd,
        n_layer=model_config.n_layer,
        n_head=model_config.n_head,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    model = GPT2LMHeadModel(theirs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(0, 32000, (8, 256))

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
