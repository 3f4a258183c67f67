"""The layout as DeepSpeed sees it: over which ranks ZeRO shards, and over which it sums the gradient norm."""

import pytest
import torch.distributed as dist
from support.pool import Pool

from megagpt.engine.mpu import DeepSpeedMPU
from megagpt.parallel.topology import Layout, Topology


def seen_by_deepspeed(tensor: int, pipeline: int, context: int, shard: bool) -> dict[str, object]:
    mpu = DeepSpeedMPU(Topology.create(tensor, pipeline, context=context), shard)
    shard_group, model_group = mpu.get_data_parallel_group(), mpu.get_model_parallel_group()
    assert shard_group is not None and model_group is not None
    assert mpu.get_data_parallel_rank() == dist.get_rank(shard_group)
    assert mpu.get_data_parallel_world_size() == dist.get_world_size(shard_group)
    assert mpu.get_model_parallel_world_size() == dist.get_world_size(model_group)
    return {
        "shards": dist.get_process_group_ranks(shard_group),
        "model": dist.get_process_group_ranks(model_group),
        "model_parallel_rank": mpu.get_model_parallel_rank(),
    }


@pytest.mark.parametrize("tensor, pipeline, context", [(2, 2, 1), (2, 1, 2), (1, 4, 2), (8, 1, 1), (1, 1, 1), (1, 1, 8)])
def test_zero_shards_over_the_ranks_with_the_same_parameters_and_norms_are_summed_over_a_replica(
    tensor: int, pipeline: int, context: int, ranks: Pool
) -> None:
    layout = Layout(tensor=tensor, pipeline=pipeline, context=context, data=8 // (tensor * pipeline * context))
    for rank, seen in enumerate(ranks.run(8, seen_by_deepspeed, tensor, pipeline, context, True)):
        assert seen["shards"] == layout.ranks_along(rank, "data", "context")
        assert seen["model"] == layout.ranks_along(rank, "pipeline", "tensor")
        # DeepSpeed counts replicated parameters where this is 0: on the first tensor rank of every stage.
        assert seen["model_parallel_rank"] == layout.coordinates(rank).tensor


@pytest.mark.parametrize("tensor, pipeline, context", [(2, 2, 1), (1, 1, 2), (1, 1, 1)])
def test_without_sharding_each_rank_is_a_shard_group_of_its_own(tensor: int, pipeline: int, context: int, ranks: Pool) -> None:
    layout = Layout(tensor=tensor, pipeline=pipeline, context=context, data=4 // (tensor * pipeline * context))
    for rank, seen in enumerate(ranks.run(4, seen_by_deepspeed, tensor, pipeline, context, False)):
        assert seen["shards"] == [rank]
        assert seen["model"] == layout.ranks_along(rank, "pipeline", "tensor")
