"""Collectives as autograd pairs: the forward is right, and the backward is its transpose.

The transpose of A is the operator with <A x, y> = <x, A^T y> for all x and y. The inner products are those of the entire
distributed tensor: summed over the ranks if each holds its own values, counted once if all hold the same.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor
from torch.distributed import ProcessGroup

from megagpt.parallel.collectives import (
    all_gather_sequence,
    all_reduce,
    all_to_all,
    copy_to_ranks,
    exchange,
    gather_sequence,
    reduce_from_ranks,
    reduce_scatter_sequence,
    reduce_scatter_to_sequence,
)

BATCH, SEQ, HIDDEN = 2, 12, 3
Operator = Callable[[Tensor, ProcessGroup | None], Tensor]


class Pair(NamedTuple):
    """An autograd pair and what is expected of it."""

    operator: Operator
    forward: Callable[[list[Tensor], int], Tensor]
    """(inputs of all ranks, rank) -> output of this rank."""
    replicated_input: bool = False
    """All ranks hold the same input: it is one tensor, not a tensor per rank."""
    replicated_output: bool = False


def scattered(inputs: list[Tensor], rank: int) -> Tensor:
    return sum(inputs).chunk(len(inputs), 1)[rank]


def exchanged(inputs: list[Tensor], rank: int) -> Tensor:
    return torch.cat([x.chunk(len(inputs), 0)[rank] for x in inputs])


PAIRS = {
    "copy_to_ranks": Pair(copy_to_ranks, lambda inputs, rank: inputs[rank], replicated_input=True),
    "reduce_from_ranks": Pair(reduce_from_ranks, lambda inputs, rank: sum(inputs), replicated_output=True),
    "gather_sequence": Pair(gather_sequence, lambda inputs, rank: torch.cat(inputs, 1)),
    "reduce_scatter_to_sequence": Pair(reduce_scatter_to_sequence, scattered),
    "exchange": Pair(exchange, exchanged),
}


def random(*seed: int, shape: tuple[int, ...] = (4 * BATCH, SEQ, HIDDEN)) -> Tensor:
    """Return float64 values that depend on `seed` only, so that every rank knows the input of all ranks."""
    number = sum(part * 100**index for index, part in enumerate(seed))
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(number))


def check_pair(name: str, non_contiguous: bool) -> None:
    """Check forward and transpose on this rank. Collective."""
    pair, rank, world, group = PAIRS[name], dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    inputs = [random(1, 0 if pair.replicated_input else other) for other in range(world)]
    x = inputs[rank].clone()
    if non_contiguous:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert not x.is_contiguous()
    before = x.clone()
    x.requires_grad_()
    out = pair.operator(x, group)
    torch.testing.assert_close(out, pair.forward(inputs, rank), rtol=1e-12, atol=0)
    y = random(2, 0 if pair.replicated_output else rank, shape=tuple(out.shape))
    if non_contiguous:
        y = y.transpose(1, 2).contiguous().transpose(1, 2)
    out.backward(y.clone())
    assert torch.equal(x, before), "the input has changed"
    assert x.grad is not None and x.grad.shape == x.shape
    left, right = (out * y).sum().detach(), (x * x.grad).sum().detach()
    if not pair.replicated_output:
        dist.all_reduce(left)
    if not pair.replicated_input:
        dist.all_reduce(right)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=0)
    if pair.replicated_input:  # the gradient of one tensor is equal on all ranks
        gradients = [torch.empty_like(x.grad) for _ in range(world)]
        dist.all_gather(gradients, x.grad.contiguous())
        assert all(torch.equal(gradient, x.grad) for gradient in gradients)


def check_pairs(non_contiguous: bool) -> None:
    for name in PAIRS:
        check_pair(name, non_contiguous)


@pytest.mark.parametrize("non_contiguous", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_the_backward_is_the_transpose_of_a_right_forward(world: int, non_contiguous: bool, ranks: Pool) -> None:
    ranks.run(world, check_pairs, non_contiguous)


@pytest.mark.parametrize(
    "operator",
    [*(pair.operator for pair in PAIRS.values()), all_reduce, all_gather_sequence, reduce_scatter_sequence, all_to_all],
)
def test_one_rank_communicates_nothing_and_copies_nothing(operator: Operator) -> None:
    x = random(1)
    assert operator(x, None) is x


def keeps_dtype() -> None:
    for pair in PAIRS.values():
        x = random(1, shape=(2, 4, 2)).to(torch.bfloat16).requires_grad_()
        out = pair.operator(x, dist.group.WORLD)
        out.sum().backward()
        assert out.dtype == x.grad.dtype == torch.bfloat16


def test_bf16_is_sent_as_bf16(ranks: Pool) -> None:
    ranks.run(2, keeps_dtype)
