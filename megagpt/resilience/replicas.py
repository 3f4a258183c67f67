"""Whether ranks that hold the same weights hold the same bits: one small number a weight, compared within each group.

A sum of the weights' bits as integers does not depend on the order of adding, so it is the same number wherever the bits
are. Each position has a weight of its own in the sum, so that two that change places show.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megagpt.errors import TrainingError, listed
from megagpt.parallel.shard import shard_of
from megagpt.parallel.topology import Topology

_INTEGERS = {2: torch.int16, 4: torch.int32}
_PART = 2**22
"""Elements at a time, for little memory beside the weights."""


def check_replicas(parameters: Sequence[nn.Parameter], tied: Sequence[nn.Parameter], topology: Topology, sharded: bool) -> None:
    """Compare over data ranks (not where ZeRO-3 gives each a part: `sharded`), over tensor ranks what these hold whole, and
    over the first and last stage the `tied` embedding (collective).

    Raises TrainingError on every rank, naming the weights and the ranks that differ.
    """
    marks = {p: fingerprint(p.ds_tensor if sharded else p) for p in parameters}  # type: ignore[attr-defined]
    found: list[str] = []
    if not sharded:
        found += _differences(marks, parameters, topology.data_group, "data")
    found += _differences(marks, [p for p in parameters if shard_of(p).dim is None], topology.tensor_group, "tensor")
    found += _differences(marks, tied, topology.ends_group, "pipeline")
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, found)
    differing = list(dict.fromkeys(text for texts in everywhere for text in texts))
    if differing:
        raise TrainingError(
            "weights that must be the same on several ranks are not (resilience.replica_check_interval): "
            f"{'; '.join(differing[:8])}{f' and {len(differing) - 8} more' if len(differing) > 8 else ''}; "
            "go on from a checkpoint, and without the node at fault"
        )


def fingerprint(tensor: Tensor) -> Tensor:
    """A number of 64 bits that depends on every bit and its place; a scalar int64 on the tensor's device."""
    flat = tensor.detach().reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), _PART):
        part = bits[start : start + _PART].long()
        places = torch.arange(start, start + len(part), device=flat.device)
        total += (part * (2 * places + 1) * 0x9E3779B1).sum()  # modulo 2**64; odd factors lose no bit of a weight
    return total


def _differences(
    marks: dict[nn.Parameter, Tensor], parameters: Sequence[nn.Parameter], group: ProcessGroup | None, axis: str
) -> list[str]:
    """Sentences about the parameters in this rank's group, the same on each of its ranks."""
    if group is None or not parameters:
        return []
    ranks = dist.get_process_group_ranks(group)
    mine = torch.stack([marks[parameter] for parameter in parameters])
    all_marks = [torch.empty_like(mine) for _ in ranks]
    dist.all_gather(all_marks, mine, group=group)
    table = torch.stack(all_marks)  # [rank, weight]
    found = []
    for number in (table != table[0]).any(0).nonzero().flatten().tolist():
        column = table[:, number].tolist()
        usual = max(column, key=column.count)
        odd = [rank for rank, mark in zip(ranks, column, strict=True) if mark != usual]
        of = f"the {axis} ranks {listed(map(str, ranks))}"
        who = f"{of} all differ" if column.count(usual) == 1 else f"of {of}, {listed(map(str, odd))} differs"
        found.append(f"{shard_of(parameters[number]).name}: {who}")
    return found
