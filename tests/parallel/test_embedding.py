"""The vocabulary-parallel embedding equals torch's: values and gradients, with or without padding entries.

Sums of a few fp32 gradients (rounding 6e-8) agree within 2e-6 of their size.
"""

import pytest
import torch
import torch.nn.functional as F
from support.pool import Pool
from support.vocabulary import PADDED, WIDTH, local_positions, parallel_context, table_of

from megagpt.parallel.parameter import shard_of

BATCH, SEQ = 2, 8


def embed(vocab_size: int, tensor: int, sequence_parallel: bool) -> None:
    """Compare output and weight gradient on this rank with torch's, immediately and deferred."""
    parallel = parallel_context(tensor, sequence_parallel)
    generator = torch.Generator().manual_seed(vocab_size)
    weight = torch.randn(vocab_size, WIDTH, generator=generator).requires_grad_()
    tokens = torch.randint(0, vocab_size, (BATCH, SEQ), generator=generator)
    tokens[0, :2] = tokens[1, 0]  # a repeated token: its gradients add up
    upstream = torch.randn(BATCH, SEQ, WIDTH, generator=generator)
    expected = F.embedding(tokens, weight)
    expected.backward(upstream)
    table = table_of(weight.detach(), parallel)
    start, entries = shard_of(table.weight).start, len(table.weight)

    out = table(tokens)
    assert torch.equal(out, local_positions(expected.detach(), parallel))  # a sum of one value and zeros
    with parallel.deferred_gradients.deferring() as jobs:
        out.backward(local_positions(upstream, parallel))
    assert table.weight.grad is None and len(jobs) == 1
    jobs[0]()
    wanted = torch.zeros(PADDED, WIDTH)
    wanted[:vocab_size] = weight.grad
    torch.testing.assert_close(table.weight.grad, wanted[start : start + entries], rtol=2e-6, atol=1e-6)
    assert not wanted[vocab_size:].any() and not table.weight.grad[max(0, vocab_size - start) :].any()

    before = table.weight.grad.clone()
    table(tokens).backward(local_positions(upstream, parallel))  # a second micro-batch
    torch.testing.assert_close(table.weight.grad, 2 * before)
    table.weight.grad = None
    table.weight.requires_grad_(False)
    assert not table(tokens).requires_grad


@pytest.mark.parametrize("tensor, sequence_parallel", [(1, False), (2, False), (2, True), (4, False), (4, True)])
def test_the_embedding_and_its_gradient_are_those_of_torch(tensor: int, sequence_parallel: bool, ranks: Pool) -> None:
    for vocab_size in (64, 45, 17):  # without padding, with some, and with ranks that hold nothing else
        ranks.run(tensor, embed, vocab_size, tensor, sequence_parallel)
