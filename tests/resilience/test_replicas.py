"""Silent divergence: one rank's weight changed by one bit is seen, named, and seen by all ranks."""

from typing import Any

import pytest
import torch
from support.pool import Pool
from support.runs import Tree, micro_batches, tiny_config, token_count

from megagpt.config import Config
from megagpt.errors import TrainingError
from megagpt.parallel.shard import shard_of
from megagpt.parallel.topology import Topology
from megagpt.resilience.replicas import check_replicas, fingerprint
from megagpt.training.engine import Engine

LAYOUTS: dict[str, tuple[int, Tree, int, str]] = {
    "2 x 2 x 2": (8, {"tensor": 2, "pipeline": 2}, 1, "bf16"),
    "sequence parallel, ZeRO-2": (4, {"tensor": 2, "sequence_parallel": True}, 2, "fp32"),
    "tensor 2 x data 2, ZeRO-3": (4, {"tensor": 2}, 3, "fp32"),
    "data 3, ZeRO-0": (3, {}, 0, "fp32"),
}


def checked(config: Config, rank: int, name: str) -> list[str]:
    """What is found after two steps, and after one bit of a weight of one rank has changed."""
    topology = Topology.create(config.parallel.tensor, config.parallel.pipeline)
    engine = Engine(config, topology, torch.device("cpu"))
    for step in range(2):
        batches = micro_batches(config, step, topology.at.data, topology.layout.data)
        engine.train_step(batches, token_count(config, step), 1e-3)
    found = [outcome(engine)]
    if topology.rank == rank:
        for parameter in engine.parameters:
            if shard_of(parameter).name == name:
                held: Any = parameter.ds_tensor if config.zero.stage == 3 else parameter  # type: ignore[attr-defined]
                held.data.view(-1).view(torch.uint8)[2] ^= 1
    found.append(outcome(engine))
    engine.close()
    return found


def outcome(engine: Engine) -> str:
    try:
        check_replicas(engine.parameters, engine.tied, engine.topology, engine.config.zero.stage == 3)
    except TrainingError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("layout", "rank", "name", "said"),
    [
        ("2 x 2 x 2", 3, "layers.0.mlp.up.weight", "layers.0.mlp.up.weight: the data ranks 1, 3 all differ"),
        ("2 x 2 x 2", 0, "embedding.token.weight", "embedding.token.weight: the pipeline ranks 0, 4 all differ"),
        ("2 x 2 x 2", 6, "layers.2.mlp.down.bias", "layers.2.mlp.down.bias: the tensor ranks 6, 7 all differ"),
        ("sequence parallel, ZeRO-2", 1, "final_norm.weight", "final_norm.weight: the tensor ranks 0, 1 all differ"),
        ("tensor 2 x data 2, ZeRO-3", 2, "final_norm.weight", "final_norm.weight: the tensor ranks 2, 3 all differ"),
        ("data 3, ZeRO-0", 1, "embedding.position.weight", "embedding.position.weight: of the data ranks 0, 1, 2, 1 differs"),
    ],
)
def test_one_bit_of_one_rank_is_seen_by_all(layout: str, rank: int, name: str, said: str, ranks: Pool) -> None:
    world, parallel, stage, precision = LAYOUTS[layout]
    config = tiny_config(
        parallel=parallel,
        zero={"stage": stage},
        training={"precision": precision, "global_batch_size": 2 * 6},
        model={"n_layer": 4},
    )
    for before, after in ranks.run(world, checked, config, rank, name):
        assert before == ""
        assert said in after


def test_the_number_depends_on_every_bit_and_its_place() -> None:
    """Against numpy's own arithmetic modulo 2**64, over the border between two parts of the sum."""
    import numpy as np

    values = torch.randn(2**22 + 5, generator=torch.Generator().manual_seed(0))
    bits = values.view(torch.int32).numpy().astype(np.int64).astype(np.uint64)
    with np.errstate(over="ignore"):
        expected = (bits * (2 * np.arange(len(bits), dtype=np.uint64) + 1) * np.uint64(0x9E3779B1)).sum(dtype=np.uint64)
    assert int(fingerprint(values)) == int(expected.astype(np.int64))
    swapped = values.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert fingerprint(swapped) != fingerprint(values)
    assert fingerprint(torch.tensor([0.0])) != fingerprint(torch.tensor([-0.0]))
    for dtype in (torch.bfloat16, torch.float16):
        assert fingerprint(values[:10].to(dtype)) == fingerprint(values[:10].to(dtype).clone())
