"""What a rank says to others: calls and bytes by kind and process group, counted around the groups themselves."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor
from torch.distributed import ProcessGroup

from megagpt.parallel.topology import Topology

CALLS = {
    "allreduce": ("all-reduce", 0),
    "allreduce_coalesced": ("all-reduce", 0),
    "reduce": ("reduce", 0),
    "broadcast": ("broadcast", 0),
    "allgather": ("all-gather", 0),
    "_allgather_base": ("all-gather", 0),
    "all_gather_single": ("all-gather", 0),
    "all_gather_single_coalesced": ("all-gather", 0),
    "allgather_into_tensor_coalesced": ("all-gather", 0),
    "_reduce_scatter_base": ("reduce-scatter", 1),
    "reduce_scatter_single": ("reduce-scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce-scatter", 1),
    "reduce_scatter": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", 1),
    "alltoall": ("all-to-all", 1),
    "alltoall_base": ("all-to-all", 1),
    "all_to_all_single": ("all-to-all", 1),
    "send": ("send", 0),
    "recv": ("receive", 0),
}
"""Methods of a process group: what to call them, and which argument is the whole of what is shared."""


class Kind(NamedTuple):
    """What is counted apart."""

    group: str
    """tensor, data, context, model, pipeline, ends, or other."""
    call: str


class Traffic:
    """Calls, and bytes of the whole tensors that they sum, gather, scatter or move."""

    def __init__(self) -> None:
        self.calls: Counter[Kind] = Counter()
        self.bytes: Counter[Kind] = Counter()

    def add(self, kind: Kind, n_bytes: int) -> None:
        """One call more."""
        self.calls[kind] += 1
        self.bytes[kind] += n_bytes


@contextmanager
def counting(topology: Topology) -> Iterator[Traffic]:
    """Count all that this process's groups do in the block, whoever asks them."""
    traffic, names = Traffic(), _names(topology)
    with ExitStack() as stack:
        for method, (call, position) in CALLS.items():
            if hasattr(ProcessGroup, method):
                counted = _counted(getattr(ProcessGroup, method), call, position, traffic, names)
                stack.enter_context(mock.patch.object(ProcessGroup, method, counted))
        yield traffic


def _names(topology: Topology) -> dict[ProcessGroup | None, str]:
    return {
        topology.tensor_group: "tensor",
        topology.data_group: "data",
        topology.model_group: "model",
        topology.context_group: "context",
        topology.ends_group: "ends",
        topology.towards_last: "pipeline",
        topology.towards_first: "pipeline",
    }


def _counted(
    method: Callable[..., Any], call: str, position: int, traffic: Traffic, names: dict[ProcessGroup | None, str]
) -> Callable[..., Any]:
    def counted(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        traffic.add(Kind(names.get(group, "other"), call), _bytes(args[position]))
        return method(group, *args, **kwargs)

    return counted


def _bytes(shared: Any) -> int:
    """Of a tensor, or of tensors in lists."""
    if isinstance(shared, Tensor):
        return shared.numel() * shared.element_size()
    return sum(map(_bytes, shared))
