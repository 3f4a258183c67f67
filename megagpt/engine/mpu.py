"""The layout in the form that DeepSpeed expects (its `mpu` protocol)."""

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megagpt.parallel.topology import Topology


class DeepSpeedMPU:
    """Names the ranks over which ZeRO shards, and those over which the gradient norm is summed.

    DeepSpeed's data-parallel group holds the ranks with the same parameters: data-parallel and context-parallel ranks.
    Its model-parallel group holds all tensor and pipeline ranks of one replica, but `get_model_parallel_rank` must be the
    tensor rank: DeepSpeed counts replicated parameters where it is 0. Under ZeRO 0 each rank is a shard group of its own,
    and `gradient_sync.py` sums over the replicas instead.
    """

    def __init__(self, topology: Topology, shard: bool) -> None:
        self._topology = topology
        self._shard = shard
        needs_single = topology.dp_cp_group is None or topology.model_parallel_group is None or not shard
        single = _group_of_one(topology.rank) if needs_single else None
        self._shard_group = (topology.dp_cp_group if shard else None) or single
        self._model_group = topology.model_parallel_group or single

    def get_data_parallel_group(self) -> ProcessGroup | None:
        return self._shard_group

    def get_data_parallel_rank(self) -> int:
        return self._topology.dp_cp_rank if self._shard else 0

    def get_data_parallel_world_size(self) -> int:
        return self._topology.layout.dp_cp if self._shard else 1

    def get_model_parallel_group(self) -> ProcessGroup | None:
        return self._model_group

    def get_model_parallel_rank(self) -> int:
        return self._topology.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._topology.layout.tensor * self._topology.layout.pipeline


def _group_of_one(rank: int) -> ProcessGroup:
    group = dist.new_group([rank], use_local_synchronization=True)
    assert isinstance(group, ProcessGroup)
    return group
