"""Count the collectives and messages of this process: calls and bytes, by process group and kind."""

from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt.parallel.topology import SHARED, Topology

OPERATORS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "reduce_scatter_": ("reduce-scatter", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "alltoall_": ("all-to-all", 1),
    "alltoall_base_": ("all-to-all", 1),
    "send": ("send", 0),
    "recv_": ("receive", 0),
}
"""torch's c10d operators: the name of the collective, and which argument is the full tensor."""


class TrafficKey(NamedTuple):
    """What is counted separately."""

    group: str
    """"tensor", "context", "dp_cp", "model_parallel", "pipeline", "embedding" (parameters that several stages share) or
    "other"."""
    call: str


class CollectiveCounter(TorchDispatchMode):
    """Inside a `with` block, counts every call of torch.distributed, whoever makes it.

    Bytes are those of the full tensors that a call sums, gathers, scatters or moves.
    """

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        self.calls: Counter[TrafficKey] = Counter()
        self.bytes: Counter[TrafficKey] = Counter()
        self._group_names = _group_names(topology)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            call, position = OPERATORS.get(func._opname, (func._opname, 0))
            key = TrafficKey(self._name_of(_group_of(args)), call)
            self.calls[key] += 1
            self.bytes[key] += _n_bytes(args[position])
        return func(*args, **(kwargs or {}))

    def _name_of(self, group: ProcessGroup | None) -> str:
        if group is None:
            return "other"
        shared = "embedding" if group.group_desc == SHARED else "other"
        return self._group_names.get(str(group.group_name), shared)


def _group_names(topology: Topology) -> dict[str, str]:
    groups = {
        "tensor": topology.tensor_group,
        "context": topology.context_group,
        "dp_cp": topology.dp_cp_group,
        "model_parallel": topology.model_parallel_group,
    }
    names = {str(group.group_name): name for name, group in groups.items() if group is not None}
    for group in (topology.pp_forward_group, topology.pp_backward_group):
        if group is not None:
            names[str(group.group_name)] = "pipeline"
    return names


def _group_of(args: Any) -> ProcessGroup | None:
    """Return the process group among an operator's arguments."""
    for argument in args:
        if type(argument).__name__ == "ScriptObject" and "ProcessGroup" in str(argument._type()):
            return ProcessGroup.unbox(argument)
    return None


def _n_bytes(tensors: Any) -> int:
    """Return the bytes of a tensor, or of tensors in nested lists."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_n_bytes, tensors))
