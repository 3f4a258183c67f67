"""The vocabulary-parallel loss with smoothed labels is torch's, value and gradients, padding rows or not.

The reference is in float64; ours sums in fp32, whose steps are 6e-8: 50 losses of about 4, and gradients of at most a few
units, come out within 2e-6 of their size.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.pool import Pool
from support.runs import tiny_config, train
from torch import Tensor

from megagpt.parallel import embedding
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.embedding import IGNORED, VocabParallelEmbedding, VocabParallelLoss
from megagpt.parallel.parameter import ParallelContext
from megagpt.parallel.topology import Topology

WIDTH, PADDED = 16, 64


def inputs(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [2, 25, WIDTH], weight [vocab_size, WIDTH] and labels [2, 25], a third of them ignored; float64."""
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(2, 25, WIDTH, generator=generator).double()
    weight = torch.randn(vocab_size, WIDTH, generator=generator).double()
    labels = torch.randint(0, vocab_size, (2, 25), generator=generator)
    labels[torch.rand(2, 25, generator=generator) < 1 / 3] = IGNORED
    return hidden, weight, labels


def ours(vocab_size: int, smoothing: float, tensor: int, training: bool) -> dict[str, Any]:
    """Loss and gradients by the module, on `tensor` ranks; seven rows of logits at a time, so that chunks are ragged."""
    topology = Topology.create(tensor, 1)
    tp = ParallelContext(DeferredGradients(), topology.tensor_group, topology.tp_rank, tensor)
    hidden, weight, labels = inputs(vocab_size)
    table = VocabParallelEmbedding("w", vocab_size, PADDED, WIDTH, tp, 0.0)
    rows = PADDED // tensor
    with torch.no_grad():  # what a checkpoint cannot bring is in the padding rows: it must not matter
        table.weight.fill_(3.0)
        mine = weight.float()[topology.tp_rank * rows :][:rows]
        table.weight[: len(mine)] = mine
    module = VocabParallelLoss(table.weight, tp, smoothing).train(training)
    leaf = hidden.float().requires_grad_()
    at_once = embedding._LOGITS_AT_ONCE["cpu"]
    embedding._LOGITS_AT_ONCE["cpu"] = 7 * rows
    try:
        loss = module(leaf, labels)
        loss.backward(torch.tensor(0.5))
    finally:
        embedding._LOGITS_AT_ONCE["cpu"] = at_once
    assert leaf.grad is not None and table.weight.grad is not None
    return {"loss": loss.item(), "hidden": leaf.grad.numpy(), "weight": table.weight.grad.numpy()}


def torchs(vocab_size: int, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, labels = inputs(vocab_size)
    hidden.requires_grad_(), weight.requires_grad_()
    logits = hidden.flatten(0, 1) @ weight.t()
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    (0.5 * loss).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("vocab_size, smoothing", [(64, 0.1), (45, 0.1), (45, 0.0), (17, 0.9)])
def test_value_and_gradients_are_torchs(vocab_size: int, smoothing: float, tensor: int, ranks: Pool) -> None:
    loss, by_hidden, by_weight = torchs(vocab_size, smoothing)
    results = ranks.run(tensor, ours, vocab_size, smoothing, tensor, True)
    for result in results:
        assert result["loss"] == pytest.approx(loss.item(), rel=2e-6)
        torch.testing.assert_close(torch.from_numpy(result["hidden"]), by_hidden.float(), rtol=2e-6, atol=5e-6)
    whole = torch.cat([torch.from_numpy(result["weight"]) for result in results])
    torch.testing.assert_close(whole[:vocab_size], by_weight.float(), rtol=2e-6, atol=5e-6)
    assert not whole[vocab_size:].any(), "a padding row has a gradient"


def test_an_evaluation_has_the_plain_loss(ranks: Pool) -> None:
    (result,) = ranks.run(1, ours, 45, 0.3, 1, False)
    assert result["loss"] == pytest.approx(torchs(45, 0.0)[0].item(), rel=2e-6)
    assert abs(result["loss"] - torchs(45, 0.3)[0].item()) > 1


def test_the_config_reaches_the_loss_under_any_layout(ranks: Pool) -> None:
    smoothed = tiny_config(training={"label_smoothing": 0.2})
    plain, reference = ranks.run(1, train, tiny_config(), 2), ranks.run(1, train, smoothed, 2)
    assert abs(plain[0]["losses"][0] - reference[0]["losses"][0]) > 1e-2
    split = tiny_config(training={"label_smoothing": 0.2}, parallel={"tensor": 2, "pipeline": 2})
    results = ranks.run(4, train, split, 2)
    assert results[0]["losses"] == pytest.approx(reference[0]["losses"], rel=1e-5)
    assert results[0]["norms"] == pytest.approx(reference[0]["norms"], rel=1e-5)
