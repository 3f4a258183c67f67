"""Silent divergence: one changed bit in one rank's copy of a weight is reported on all ranks, with the weight and the rank."""

import numpy as np
import pytest
import torch
from support.pool import Pool
from support.runs import Tree, create_engine, tiny_config, train_step

from megagpt.config import Config
from megagpt.engine.deepspeed_internals import local_weights
from megagpt.engine.engine import Engine
from megagpt.errors import TrainingError
from megagpt.parallel.parameter import shard_of
from megagpt.resilience.replicas import check_replicas, weight_hash

LAYOUTS: dict[str, tuple[int, Tree, int, str]] = {
    "2 x 2 x 2": (8, {"tensor": 2, "pipeline": 2}, 1, "bf16"),
    "sequence parallel, ZeRO-2": (4, {"tensor": 2, "sequence_parallel": True}, 2, "fp32"),
    "tensor 2 x data 2, ZeRO-3": (4, {"tensor": 2}, 3, "fp32"),
    "data 3, ZeRO-0": (3, {}, 0, "fp32"),
}


def errors_before_and_after_a_flipped_bit(config: Config, rank: int, name: str) -> list[str]:
    """Return the errors of the check after two steps, and again after one bit of a weight of one rank has changed."""
    engine = create_engine(config)
    for step in range(2):
        train_step(engine, step)
    errors = [error_of_check(engine)]
    if engine.topology.rank == rank:
        for parameter in engine.parameters:
            if shard_of(parameter).name == name:
                local_weights(parameter).data.view(-1).view(torch.uint8)[2] ^= 1
    errors.append(error_of_check(engine))
    engine.close()
    return errors


def error_of_check(engine: Engine) -> str:
    """Return the error message, or nothing if the replicas are equal."""
    try:
        check_replicas(engine.parameters, engine.shared, engine.topology)
    except TrainingError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("layout", "rank", "name", "message"),
    [
        ("2 x 2 x 2", 3, "layers.0.mlp.up.weight", "layers.0.mlp.up.weight: the data ranks 1, 3 all differ"),
        ("2 x 2 x 2", 0, "embedding.token.weight", "embedding.token.weight: the pipeline ranks 0, 4 all differ"),
        ("2 x 2 x 2", 6, "layers.2.mlp.down.bias", "layers.2.mlp.down.bias: the tensor ranks 6, 7 all differ"),
        ("sequence parallel, ZeRO-2", 1, "final_norm.weight", "final_norm.weight: the tensor ranks 0, 1 all differ"),
        ("tensor 2 x data 2, ZeRO-3", 2, "final_norm.weight", "final_norm.weight: the tensor ranks 2, 3 all differ"),
        ("data 3, ZeRO-0", 1, "embedding.position.weight", "embedding.position.weight: of the data ranks 0, 1, 2, 1 differs"),
    ],
)
def test_one_changed_bit_on_one_rank_is_reported_on_all_ranks(
    layout: str, rank: int, name: str, message: str, ranks: Pool
) -> None:
    world, parallel, stage, precision = LAYOUTS[layout]
    config = tiny_config(
        parallel=parallel,
        zero={"stage": stage},
        training={"precision": precision, "micro_batch_size": 2, "global_batch_size": 2 * 6},
        model={"n_layer": 4},
    )
    for before, after in ranks.run(world, errors_before_and_after_a_flipped_bit, config, rank, name):
        assert before == ""
        assert message in after
        assert "resilience.replica_check_interval" in after


def test_the_hash_depends_on_every_bit_and_its_position() -> None:
    """It equals numpy's arithmetic modulo 2**64, also across the border of two blocks."""
    values = torch.randn(2**22 + 5, generator=torch.Generator().manual_seed(0))
    bits = values.view(torch.int32).numpy().astype(np.int64).astype(np.uint64)
    with np.errstate(over="ignore"):
        expected = (bits * (2 * np.arange(len(bits), dtype=np.uint64) + 1) * np.uint64(0x9E3779B1)).sum(dtype=np.uint64)
    assert int(weight_hash(values)) == int(expected.astype(np.int64))
    swapped = values.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert weight_hash(swapped) != weight_hash(values)
    assert weight_hash(torch.tensor([0.0])) != weight_hash(torch.tensor([-0.0]))
    for dtype in (torch.bfloat16, torch.float16):
        assert weight_hash(values[:10].to(dtype)) == weight_hash(values[:10].to(dtype).clone())
