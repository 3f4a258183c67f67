"""Training runs on ranks for tests: fixed data, any layout, and each rank's weights joined to full parameters."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from megagpt.config import Config, build_config
from megagpt.data.blend import build_datasets
from megagpt.data.encoder_samples import encoder_format
from megagpt.data.indexed import IndexedWriter
from megagpt.engine.engine import Engine, StepResult
from megagpt.model.chunk import build_chunk
from megagpt.model.forward_context import MicroBatch
from megagpt.parallel.context_parallel import ContextParallel
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import shard_of
from megagpt.parallel.topology import Topology
from megagpt.training.trainer import Trainer

Tree = dict[str, Any]


def tiny_config(**sections: Tree) -> Config:
    """Return the config of a tiny model, with keys of any section replaced."""
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
        "training": {"steps": 10, "micro_batch_size": 4, "global_batch_size": 16, "seed": 7},
        "optimizer": {"learning_rate": 1e-2, "clip_grad": 0.05, "eps": 1e-4},
    }
    for section, keys in sections.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return build_config(tree)


def full_model(config: Config) -> Any:
    """Return the entire model of the config with its initial weights, as one chunk of a single process."""
    return build_chunk(config, ParallelContext(), range(config.model.n_blocks))


def parameters_by_name(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by the names that are the same under every layout."""
    return {shard_of(parameter).name: parameter for parameter in module.parameters()}


def micro_batches(config: Config, step: int, dp_rank: int, dp_size: int) -> list[MicroBatch]:
    """Return this data-parallel rank's share of a random global batch that depends on `step` only; some labels are ignored."""
    generator = torch.Generator().manual_seed(step)
    size, micro, seq = config.training.global_batch_size, config.training.micro_batch_size, config.model.n_positions
    tokens = torch.randint(0, config.model.tokens_in_vocab, (size, seq + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    # Different numbers of labels per sequence, so that a mean of micro-batch means differs from the mean over all tokens.
    labels[torch.rand(labels.shape, generator=generator) < torch.linspace(0, 0.9, size).unsqueeze(1)] = -100
    samples = step * size + torch.arange(size)
    source = lengths = None
    if config.model.encoder_layers:
        n_source = config.model.source_length
        source = torch.randint(0, config.model.tokens_in_vocab, (size, n_source), generator=generator)
        lengths = torch.randint(1, n_source + 1, (size,), generator=generator)
    first, share = dp_rank * size // dp_size, size // dp_size
    return [
        MicroBatch(
            tokens[row : row + micro, :-1],
            labels[row : row + micro],
            samples[row : row + micro],
            source=None if source is None else source[row : row + micro],
            source_lengths=None if lengths is None else lengths[row : row + micro],
        )
        for row in range(first, first + share, micro)
    ]


def local_micro_batches(config: Config, step: int, topology: Topology) -> list[MicroBatch]:
    """Return `micro_batches` of this rank, with this context rank's positions."""
    context = ContextParallel(rank=topology.cp_rank, size=topology.layout.context)
    return [
        replace(
            batch,
            tokens=context.local_positions(batch.tokens),
            labels=context.local_positions(batch.labels),
            source=None if batch.source is None else context.local_positions(batch.source),
        )
        for batch in micro_batches(config, step, topology.dp_rank, topology.layout.data)
    ]


def count_labels(config: Config, step: int) -> int:
    """Return the unmasked labels in the global batch."""
    return sum(int((batch.labels != -100).sum()) for batch in micro_batches(config, step, 0, 1))


def create_topology(config: Config) -> Topology:
    """Return the topology of the config on the ranks of the pool."""
    return Topology.create(config.parallel.tensor, config.parallel.pipeline, context=config.parallel.context)


def create_engine(config: Config) -> Engine:
    """Return the real engine of the config on the ranks of the pool."""
    return Engine(config, create_topology(config), torch.device("cpu"))


def train_step(engine: Engine, step: int) -> tuple[torch.Tensor | None, StepResult]:
    """Run one step on `micro_batches`; return the sum of this rank's losses and the engine's result."""
    config = engine.config
    loss_sum = engine.forward_backward(local_micro_batches(config, step, engine.topology), count_labels(config, step))
    return loss_sum, engine.step(config.optimizer.learning_rate)


def train(config: Config, steps: int) -> Tree:
    """Return losses and gradient norms of every step and the final weights of this rank, from the real engine."""
    engine = create_engine(config)
    losses, norms = [], []
    for step in range(steps):
        loss_sum, result = train_step(engine, step)
        total = torch.zeros(1) if loss_sum is None else loss_sum.reshape(1).clone()
        dist.all_reduce(total)
        losses.append(total.item() / config.parallel.tensor / count_labels(config, step))
        norms.append(result.grad_norm)
    weights = local_weights(engine)
    engine.close()
    return {"losses": losses, "norms": norms, "weights": weights}


def local_weights(engine: Engine) -> list[tuple[str, tuple[int, ...], int | None, int, Any]]:
    """Return (name, full shape, split dim, offset, values) of each parameter on this rank."""
    import deepspeed

    weights = []
    for parameter in engine.parameters:
        shard = shard_of(parameter)
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.config.zero.stage == 3):
            values = parameter.detach().float().clone().numpy()
        if not shard.second_copy:
            weights.append((shard.name, shard.shape, shard.dim, shard.start, values))
    return weights


def full_weights(results: list[Tree]) -> dict[str, torch.Tensor]:
    """Join the weights of all ranks to full parameters; replicas must agree bit for bit."""
    full: dict[str, torch.Tensor] = {}
    seen: dict[tuple[str, int], torch.Tensor] = {}
    for result in results:
        for name, shape, dim, start, values in result["weights"]:
            values = torch.from_numpy(values)
            if (name, start) in seen:
                assert torch.equal(seen[name, start], values), f"replicas of {name} differ"
            seen[name, start] = values
            target = full.setdefault(name, torch.full(shape, float("nan")))
            along = dim or 0
            length = max(0, min(values.shape[along], shape[along] - start))
            if length:
                target.narrow(along, start, length).copy_(values.narrow(along, 0, length))
    assert not any(tensor.isnan().any() for tensor in full.values())
    return full


def corpus(folder: Path, documents: int = 60, vocab_size: int = 61) -> str:
    """Write a small corpus of random documents; return its prefix."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(5, 60, documents)
    with IndexedWriter(folder / "corpus", np.dtype(np.uint16)) as writer:
        writer.add_documents(generator.integers(0, vocab_size, int(sizes.sum())).astype(np.uint16), sizes)
    return str(folder / "corpus")


def run_trainer(config: Config) -> Tree:
    """Run the real training loop; return this rank's final weights and, on rank 0, the records of the metrics file."""
    trainer = open_trainer(config)
    trainer.train()
    weights, step = local_weights(trainer.engine), trainer.step
    trainer.close()
    path = Path(config.logging.metrics_file or "/nowhere")
    records = (
        [json.loads(line) for line in path.read_text().splitlines()] if trainer.topology.rank == 0 and path.exists() else []
    )
    return {"weights": weights, "step": step, "losses": [r["loss"] for r in records if "loss" in r], "records": records}


def open_trainer(config: Config) -> Trainer:
    """Return the real trainer of a config, on the ranks of the pool."""
    return Trainer(
        config,
        create_topology(config),
        build_datasets(config.data, config.model.n_positions, encoder_format(config.model)),
        torch.device("cpu"),
    )


class Losses:
    """A logger that stores the losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def step(self, record: Tree) -> None:
        self.values += [record["loss"]] if "loss" in record else []

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def compare(results: list[Tree], reference: list[Tree]) -> None:
    """Assert equal losses and norms on every rank, and equal full weights."""
    for result in results:
        assert result["losses"] == pytest.approx(reference[0]["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(reference[0]["norms"], rel=1e-5)
    weights, expected = full_weights(results), full_weights(reference)
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(weights[name], values, rtol=0, atol=5e-6, msg=lambda text, name=name: f"{name}: {text}")
