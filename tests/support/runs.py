"""Training runs on ranks for tests: fixed data, any layout, what each rank holds brought back in logical shape."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megagpt.config import Config, build_config
from megagpt.data.blend import build_datasets
from megagpt.data.indexed import IndexedWriter
from megagpt.model.gpt import MicroBatch
from megagpt.parallel.context import ContextParallel
from megagpt.parallel.random import stable_seed
from megagpt.parallel.shard import is_second_copy, shard_of
from megagpt.parallel.topology import Topology
from megagpt.training.engine import Engine
from megagpt.training.trainer import Trainer

Tree = dict[str, Any]


def tiny_config(**sections: Tree) -> Config:
    """A model small enough for a test, with any section's keys replaced."""
    tree: Tree = {
        "model": {
            "n_layer": 4,
            "n_embd": 32,
            "n_head": 4,
            "n_positions": 16,
            "vocab_size": 61,
            "vocab_multiple": 16,
            "init_std": 0.2,
        },
        "training": {"steps": 10, "micro_batch_size": 2, "global_batch_size": 16, "seed": 7},
        "optimizer": {"learning_rate": 1e-2, "clip_grad": 0.05, "eps": 1e-4},
    }
    for section, keys in sections.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return build_config(tree)


def micro_batches(config: Config, step: int, data_rank: int, data_size: int) -> list[MicroBatch]:
    """This data rank's part of a random global batch that depends on the step alone; some labels are ignored."""
    generator = torch.Generator().manual_seed(step)
    size, micro, seq = config.training.global_batch_size, config.training.micro_batch_size, config.model.n_positions
    tokens = torch.randint(0, config.model.tokens_in_vocab, (size, seq + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    # Ragged, so that a mean of micro-batch means differs from the mean over all tokens.
    labels[torch.rand(labels.shape, generator=generator) < torch.linspace(0, 0.9, size).unsqueeze(1)] = -100
    first, part = data_rank * size // data_size, size // data_size
    return [
        MicroBatch(
            tokens[row : row + micro, :-1], labels[row : row + micro], stable_seed(config.training.seed, step, row // micro)
        )
        for row in range(first, first + part, micro)
    ]


def token_count(config: Config, step: int) -> int:
    """Tokens with a label in the global batch."""
    return sum(int((batch.labels != -100).sum()) for batch in micro_batches(config, step, 0, 1))


def train(config: Config, steps: int) -> Tree:
    """Losses and gradient norms of every step and the final weights that this rank holds, through the real engine."""
    topology = Topology.create(config.parallel.tensor, config.parallel.pipeline, context=config.parallel.context)
    engine = Engine(config, topology, torch.device("cpu"))
    losses, norms = [], []
    for step in range(steps):
        batches = micro_batches(config, step, topology.reader, topology.layout.readers)
        context = ContextParallel(rank=topology.context_rank, size=topology.layout.context)
        batches = [replace(batch, tokens=context.part(batch.tokens), labels=context.part(batch.labels)) for batch in batches]
        count = token_count(config, step)
        result = engine.train_step(batches, count, config.optimizer.learning_rate)
        total = torch.zeros(1) if result.loss_sum is None else result.loss_sum.reshape(1).clone()
        dist.all_reduce(total)
        losses.append(total.item() / config.parallel.tensor / count)
        norms.append(result.grad_norm)
    weights = local_weights(engine)
    engine.close()
    return {"losses": losses, "norms": norms, "weights": weights}


def local_weights(engine: Engine) -> list[tuple[str, tuple[int, ...], int | None, int, Any]]:
    """(name, logical shape, split dim, offset, values) of each parameter on this rank."""
    import deepspeed

    found = []
    for parameter in engine.parameters:
        shard = shard_of(parameter)
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.config.zero.stage == 3):
            values = parameter.detach().float().clone().numpy()
        if not is_second_copy(parameter):
            found.append((shard.name, shard.shape, shard.dim, shard.start, values))
    return found


def whole_weights(results: list[Tree]) -> dict[str, torch.Tensor]:
    """The logical parameters, put together from what all ranks hold; replicas must agree bit for bit."""
    whole: dict[str, torch.Tensor] = {}
    seen: dict[tuple[str, int], torch.Tensor] = {}
    for result in results:
        for name, shape, dim, start, values in result["weights"]:
            values = torch.from_numpy(values)
            if (name, start) in seen:
                assert torch.equal(seen[name, start], values), f"replicas of {name} differ"
            seen[name, start] = values
            target = whole.setdefault(name, torch.full(shape, float("nan")))
            along = dim or 0
            length = max(0, min(values.shape[along], shape[along] - start))
            if length:
                target.narrow(along, start, length).copy_(values.narrow(along, 0, length))
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def corpus(folder: Path, documents: int = 60, vocab_size: int = 61) -> str:
    """A small corpus of random documents; returns its prefix."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(5, 60, documents)
    with IndexedWriter(folder / "corpus", np.dtype(np.uint16)) as writer:
        writer.add_documents(generator.integers(0, vocab_size, int(sizes.sum())).astype(np.uint16), sizes)
    return str(folder / "corpus")


def run_trainer(config: Config) -> Tree:
    """The real loop; returns this rank's final weights and, on rank 0, the metrics file's records."""
    topology = Topology.create(config.parallel.tensor, config.parallel.pipeline, context=config.parallel.context)
    datasets = build_datasets(config.data, config.model.n_positions)
    trainer = Trainer(config, topology, datasets, torch.device("cpu"))
    trainer.train()
    weights, step = local_weights(trainer.engine), trainer.step
    trainer.close()
    path = Path(config.logging.metrics_file or "/nowhere")
    records = [json.loads(line) for line in path.read_text().splitlines()] if topology.rank == 0 and path.exists() else []
    return {"weights": weights, "step": step, "losses": [r["loss"] for r in records if "loss" in r], "records": records}


def open_trainer(config: Config) -> Trainer:
    """The real trainer of a config, on the ranks of the pool."""
    parallel = config.parallel
    topology = Topology.create(parallel.tensor, parallel.pipeline, context=parallel.context)
    return Trainer(config, topology, build_datasets(config.data, config.model.n_positions), torch.device("cpu"))


class Losses:
    """A logger that keeps the losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def step(self, record: Tree) -> None:
        self.values += [record["loss"]] if "loss" in record else []

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def compare(results: list[Tree], reference: list[Tree]) -> None:
    """Losses and norms on every rank, and the logical weights."""
    for result in results:
        assert result["losses"] == pytest.approx(reference[0]["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(reference[0]["norms"], rel=1e-5)
    weights, expected = whole_weights(results), whole_weights(reference)
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(weights[name], values, rtol=0, atol=5e-6, msg=lambda text, name=name: f"{name}: {text}")
