"""Host time and operators of a layer that is so narrow that arithmetic is nothing, beside plain torch modules.

Per layer and micro-batch, from the difference between two depths: microseconds and dispatched operators, forward and
backward apart; and the optimizer step, per layer. On a GPU the host's time is measured without waiting for the device.

  OMP_NUM_THREADS=1 python benchmarks/host_overhead.py
  python benchmarks/host_overhead.py --compile        with compiled functions between the matrix products
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from megagpt.config import build_config
from megagpt.distributed.launcher import Launcher
from megagpt.distributed.process_group import TIMEOUT, init_process_group
from megagpt.engine.deepspeed_internals import init_deepspeed
from megagpt.engine.engine import Engine
from megagpt.model.forward_context import MicroBatch
from megagpt.parallel.topology import Topology

DEPTHS = (4, 16)
WIDTH, HEADS, LENGTH, VOCABULARY = 32, 2, 16, 64
ROUNDS = 30


class Cost(NamedTuple):
    """Of one pass: host time and dispatched operators."""

    microseconds: float
    operators: float


class CountOperators(TorchDispatchMode):
    """Counts dispatched operators, views included: each of them takes time on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class PlainBlock(nn.Module):
    """The same block of plain torch modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def main() -> None:
    """Print one line per pass for both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="set training.compile")
    args = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    init_process_group(Launcher(), device)
    init_deepspeed(Launcher(), "nccl" if device.type == "cuda" else "gloo", TIMEOUT)
    ours = [_megagpt(depth, device, args.compile) for depth in DEPTHS]
    plain = [_plain(depth, device) for depth in DEPTHS]
    layers = DEPTHS[1] - DEPTHS[0]
    print(f"per layer ({device.type})      megagpt                     plain torch")
    for name in ours[0]:
        columns = []
        for few, many in (ours, plain):
            microseconds = (many[name].microseconds - few[name].microseconds) / layers
            operators = (many[name].operators - few[name].operators) / layers
            columns.append(f"{microseconds:7.0f} us {operators:6.1f} operators")
        print(f"  {name:14s} {columns[0]}   {columns[1]}")


def _megagpt(n_layer: int, device: torch.device, compiled: bool) -> dict[str, Cost]:
    model = {"n_layer": n_layer, "n_embd": WIDTH, "n_head": HEADS, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    training = {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1, "precision": "fp32", "compile": compiled}
    config = build_config({"model": model, "data": {"train": "none"}, "training": training, "zero": {"stage": 1}})
    engine = Engine(config, Topology(), device)
    chunk = engine.chunks[0]
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH), device=device)
    losses: list[Tensor] = []

    def step() -> None:
        engine.step(1e-4)
        engine._zero.begin()

    engine._zero.begin()
    return _costs(lambda: losses.append(chunk(None, MicroBatch(tokens, tokens))), lambda: losses.pop().backward(), step)


def _plain(n_layer: int, device: torch.device) -> dict[str, Cost]:
    blocks = nn.Sequential(*[PlainBlock() for _ in range(n_layer)]).to(device)
    embedding, norm = nn.Embedding(VOCABULARY, WIDTH).to(device), nn.LayerNorm(WIDTH).to(device)
    parameters = [*blocks.parameters(), *embedding.parameters(), *norm.parameters()]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH), device=device)
    losses: list[Tensor] = []

    def forward() -> None:
        logits = norm(blocks(embedding(tokens))) @ embedding.weight.t()
        losses.append(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()))

    def step() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return _costs(forward, lambda: losses.pop().backward(), step)


def _costs(forward: Callable[[], None], backward: Callable[[], None], step: Callable[[], None]) -> dict[str, Cost]:
    passes = {"forward": forward, "backward": backward, "optimizer step": step}
    for _ in range(3):
        _run(passes.values())
    operators = {}
    for name, run in passes.items():
        with CountOperators() as counter:
            run()
        operators[name] = counter.count
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(ROUNDS):
        for name, run in passes.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: Cost(statistics.median(seconds[name]) * 1e6, operators[name]) for name in passes}


def _run(passes: Iterable[Callable[[], None]]) -> None:
    for run in passes:
        run()


if __name__ == "__main__":
    main()
