"""Check that ranks which hold the same weights hold the same bits: one 64-bit hash per weight, compared in each group.

The hash is a sum of the weights' bits as integers, so it does not depend on the order of summation. Each position has its
own factor in the sum, so two weights that swap places change it.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megagpt.distributed.object_collectives import all_gather_object
from megagpt.engine.deepspeed_internals import is_partitioned, local_weights
from megagpt.engine.gradient_sync import SharedParameter
from megagpt.errors import TrainingError, listed
from megagpt.parallel.parameter import shard_of
from megagpt.parallel.topology import Topology

_INTEGERS = {2: torch.int16, 4: torch.int32}
_BLOCK_ELEMENTS = 2**22
"""Elements hashed at a time, to use little memory beside the weights."""


def check_replicas(parameters: Sequence[nn.Parameter], shared: Sequence[SharedParameter], topology: Topology) -> None:
    """Compare all replicated weights. Collective.

    Over data-parallel and context-parallel ranks (unless ZeRO-3 gives each a different partition), over tensor ranks the
    weights that they replicate, and over the stages that have them the `shared` ones, such as a tied embedding.
    Raises TrainingError on every rank, with the weights and the ranks that differ.
    """
    hashes = {parameter: weight_hash(local_weights(parameter)) for parameter in parameters}
    replicated = [p for p in parameters if not is_partitioned(p)]
    differences = _differences(hashes, replicated, topology.dp_cp_group, "data")
    differences += _differences(hashes, [p for p in parameters if shard_of(p).dim is None], topology.tensor_group, "tensor")
    for parameter, group in shared:
        differences += _differences(hashes, [parameter], group, "pipeline")
    all_differences = list(dict.fromkeys(text for texts in all_gather_object(differences) for text in texts))
    if all_differences:
        raise TrainingError(
            "weights that must be equal on several ranks are not (resilience.replica_check_interval): "
            f"{_joined(all_differences)}; resume from a checkpoint without the faulty node"
        )


def weight_hash(tensor: Tensor) -> Tensor:
    """Return a hash that depends on every bit and its position; an int64 scalar on the tensor's device."""
    flat = tensor.detach().reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), _BLOCK_ELEMENTS):
        block = bits[start : start + _BLOCK_ELEMENTS].long()
        positions = torch.arange(start, start + len(block), device=flat.device)
        total += (block * (2 * positions + 1) * 0x9E3779B1).sum()  # modulo 2**64; odd factors keep every bit
    return total


def _differences(
    hashes: dict[nn.Parameter, Tensor], parameters: Sequence[nn.Parameter], group: ProcessGroup | None, axis: str
) -> list[str]:
    """Return one sentence for each parameter that differs within this rank's group, equal on all of its ranks."""
    if group is None or not parameters:
        return []
    ranks = dist.get_process_group_ranks(group)
    local = torch.stack([hashes[parameter] for parameter in parameters])
    gathered = [torch.empty_like(local) for _ in ranks]
    dist.all_gather(gathered, local, group=group)
    table = torch.stack(gathered)  # [rank, parameter]
    sentences = []
    for index in (table != table[0]).any(0).nonzero().flatten().tolist():
        column = table[:, index].tolist()
        most_common = max(column, key=column.count)
        odd = [rank for rank, value in zip(ranks, column, strict=True) if value != most_common]
        group_text = f"the {axis} ranks {listed(map(str, ranks))}"
        if column.count(most_common) == 1:
            text = f"{group_text} all differ"
        else:
            text = f"of {group_text}, {listed(map(str, odd))} differs"
        sentences.append(f"{shard_of(parameters[index]).name}: {text}")
    return sentences


def _joined(sentences: list[str], limit: int = 8) -> str:
    rest = f" and {len(sentences) - limit} more" if len(sentences) > limit else ""
    return "; ".join(sentences[:limit]) + rest
