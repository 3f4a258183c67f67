"""Initial weights depend on seed and name alone: the same bits under every layout."""

import math

import pytest
import torch
from support.pool import Pool
from support.runs import Tree, local_weights, tiny_config, full_weights

from megagpt.config import Config
from megagpt.engine.engine import Engine
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.parameter import ParallelContext, shard_of
from megagpt.parallel.topology import Topology


def begin(config: Config) -> Tree:
    engine = Engine(config, Topology.create(config.parallel.tensor, config.parallel.pipeline), torch.device("cpu"))
    return {"weights": local_weights(engine)}


BIG: Tree = {"model": {"n_embd": 96, "vocab_size": 300, "vocab_multiple": 64}}


@pytest.mark.parametrize("world, parallel", [(2, {"tensor": 2}), (4, {"tensor": 4}), (8, {"tensor": 2, "pipeline": 4})])
def test_bit_equal_global_weights(world: int, parallel: Tree, ranks: Pool) -> None:
    expected = full_weights(ranks.run(1, begin, tiny_config(**BIG)))
    weights = full_weights(ranks.run(world, begin, tiny_config(parallel=parallel, **BIG)))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], values) for name, values in expected.items())


def test_deviations_are_those_of_gpt2_and_names_and_seeds_matter() -> None:
    from megagpt.model.gpt import build_chunk

    def build(seed: int) -> dict[str, torch.Tensor]:
        config = tiny_config(training={"seed": seed}, **BIG)
        chunk = build_chunk(config, ParallelContext(DeferredGradients()), range(4))
        return {shard_of(p).name: p.detach() for p in chunk.parameters()}

    first, other = build(1), build(2)
    assert not torch.equal(first["layers.0.mlp.up.weight"], other["layers.0.mlp.up.weight"])
    assert not torch.equal(first["layers.0.mlp.up.weight"], first["layers.1.mlp.up.weight"])
    assert first["layers.0.mlp.up.weight"].std().item() == pytest.approx(0.2, rel=0.02)
    assert first["layers.0.mlp.down.weight"].std().item() == pytest.approx(0.2 / math.sqrt(8), rel=0.02)
    assert not first["layers.0.mlp.up.bias"].any()
    assert first["final_norm.weight"].eq(1).all()
    assert not first["embedding.token.weight"][300:].any()
