"""The layout as DeepSpeed asks for it (its `mpu` protocol)."""

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megagpt.parallel.topology import Topology


class ZeroGroups:
    """Over which ranks ZeRO shards, and over which the gradient norm is summed.

    "Model parallel" to DeepSpeed is one whole copy of the model, tensor ranks and stages, except that
    `get_model_parallel_rank` must be the tensor rank: replicated parameters are counted where it is 0. Under ZeRO 0
    each rank is a shard group of its own, and `gradients.py` sums over the data ranks instead.
    """

    def __init__(self, topology: Topology, shards: bool) -> None:
        self._at = topology.at
        self._tensor = topology.layout.tensor
        self._model_ranks = self._tensor * topology.layout.pipeline
        alone = topology.data_group is None or topology.model_group is None or not shards
        mine = _group_of_one(topology.rank) if alone else None
        self._shard_group = (topology.data_group if shards else None) or mine
        self._model_group = topology.model_group or mine
        self._shard_ranks = topology.layout.data if shards else 1

    def get_data_parallel_group(self) -> ProcessGroup | None:
        return self._shard_group

    def get_data_parallel_rank(self) -> int:
        return self._at.data if self._shard_ranks > 1 else 0

    def get_data_parallel_world_size(self) -> int:
        return self._shard_ranks

    def get_model_parallel_group(self) -> ProcessGroup | None:
        return self._model_group

    def get_model_parallel_rank(self) -> int:
        return self._at.tensor

    def get_model_parallel_world_size(self) -> int:
        return self._model_ranks


def _group_of_one(rank: int) -> ProcessGroup:
    group = dist.new_group([rank], use_local_synchronization=True)
    assert isinstance(group, ProcessGroup)
    return group
