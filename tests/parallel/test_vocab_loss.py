"""The vocabulary-parallel loss equals torch's: values and gradients, with or without padding entries.

The references are in float64; megagpt sums in fp32 (rounding 6e-8): 50 losses of about 4, and gradients of at most a few
units, agree within 2e-6 of their size.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.pool import Pool
from support.products import MatrixProducts
from support.runs import tiny_config, train
from support.vocabulary import PADDED, WIDTH, local_positions, parallel_context, table_of
from torch import Tensor

from megagpt.labels import IGNORED
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.vocab_loss import VocabParallelLoss


def loss_inputs(vocab_size: int, seq: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden [2, seq, WIDTH], weight [vocab_size, WIDTH] and labels [2, seq], a third of them ignored; float64."""
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(2, seq, WIDTH, generator=generator).double()
    weight = torch.randn(vocab_size, WIDTH, generator=generator).double()
    labels = torch.randint(0, vocab_size, (2, seq), generator=generator)
    labels[torch.rand(2, seq, generator=generator) < 1 / 3] = IGNORED
    return hidden, weight, labels


def loss_of_module(
    vocab_size: int, smoothing: float, tensor: int, training: bool, sequence_parallel: bool = False, chunk_tokens: int = 7
) -> dict[str, Any]:
    """Return loss and gradients of the module on `tensor` ranks; the last chunk of tokens is smaller than the others."""
    parallel = parallel_context(tensor, sequence_parallel)
    hidden, weight, labels = loss_inputs(vocab_size, 24 if sequence_parallel else 25)
    table = table_of(weight, parallel)
    entries = PADDED // tensor
    module = VocabParallelLoss(table.weight, parallel, smoothing, chunk_tokens * entries * 4 / 2**20).train(training)
    leaf = local_positions(hidden, parallel).float().clone().requires_grad_()
    with MatrixProducts() as products:
        loss = module(leaf, labels)
    loss.backward(torch.tensor(0.5))
    assert leaf.grad is not None and table.weight.grad is not None
    return {
        "loss": loss.item(),
        "hidden": leaf.grad.numpy(),
        "weight": table.weight.grad.numpy(),
        "chunks": [tokens for tokens, width, out in products.shapes if (width, out) == (WIDTH, entries)],
    }


def loss_of_torch(vocab_size: int, smoothing: float, seq: int = 25) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss and gradients by hidden and weight."""
    hidden, weight, labels = loss_inputs(vocab_size, seq)
    hidden.requires_grad_(), weight.requires_grad_()
    logits = hidden.flatten(0, 1) @ weight.t()
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    (0.5 * loss).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("vocab_size, smoothing", [(64, 0.1), (45, 0.1), (45, 0.0), (17, 0.9)])
def test_the_loss_and_its_gradients_are_those_of_torch(vocab_size: int, smoothing: float, tensor: int, ranks: Pool) -> None:
    check_loss(ranks.run(tensor, loss_of_module, vocab_size, smoothing, tensor, True), vocab_size, smoothing, seq=25)


@pytest.mark.parametrize("tensor", [2, 4])
def test_the_loss_under_sequence_parallelism_has_the_gradients_of_each_rank_s_positions(tensor: int, ranks: Pool) -> None:
    results = ranks.run(tensor, loss_of_module, 45, 0.1, tensor, True, True)
    for result in results:
        assert result["hidden"].shape == (2, 24 // tensor, WIDTH)
    joined = torch.cat([torch.from_numpy(result["hidden"]) for result in results], 1).numpy()
    check_loss([{**result, "hidden": joined} for result in results], 45, 0.1, seq=24)


def check_loss(results: list[dict[str, Any]], vocab_size: int, smoothing: float, seq: int) -> None:
    """Assert that the results of all ranks are those of torch."""
    loss, by_hidden, by_weight = loss_of_torch(vocab_size, smoothing, seq)
    for result in results:
        assert result["loss"] == pytest.approx(loss.item(), rel=2e-6)
        torch.testing.assert_close(torch.from_numpy(result["hidden"]), by_hidden.float(), rtol=2e-6, atol=5e-6)
    full = torch.cat([torch.from_numpy(result["weight"]) for result in results])
    torch.testing.assert_close(full[:vocab_size], by_weight.float(), rtol=2e-6, atol=5e-6)
    assert not full[vocab_size:].any(), "a padding entry has a gradient"


@pytest.mark.parametrize("chunk_tokens, chunks", [(1, [1] * 50), (7, [7] * 7 + [1]), (25, [25, 25]), (1000, [50])])
def test_no_more_logits_exist_at_a_time_than_asked_and_the_loss_is_the_same(
    chunk_tokens: int, chunks: list[int], ranks: Pool
) -> None:
    (result,) = results = ranks.run(1, loss_of_module, 45, 0.1, 1, True, False, chunk_tokens)
    assert result["chunks"] == chunks
    check_loss(results, 45, 0.1, seq=25)


def test_an_evaluation_has_the_plain_loss(ranks: Pool) -> None:
    (result,) = ranks.run(1, loss_of_module, 45, 0.3, 1, False)
    assert result["loss"] == pytest.approx(loss_of_torch(45, 0.0)[0].item(), rel=2e-6)
    assert abs(result["loss"] - loss_of_torch(45, 0.3)[0].item()) > 1


def deferred_loss() -> tuple[bool, bool, bool]:
    """Return whether a gradient of the weight exists after an input backward, its bits are right, and hidden's are."""
    parallel = ParallelContext()
    hidden, weight, labels = loss_inputs(45, 25)
    gradients = []
    for defer in (False, True):
        table = table_of(weight, parallel)
        leaf = hidden.float().requires_grad_()
        loss = VocabParallelLoss(table.weight, parallel)(leaf, labels)
        if defer:
            with parallel.deferred_gradients.deferring() as jobs:
                loss.backward()
            exists = table.weight.grad is not None
            for job in jobs:
                job()
        else:
            loss.backward()
        gradients.append((leaf.grad, table.weight.grad))
    (hidden_now, weight_now), (hidden_later, weight_later) = gradients
    assert hidden_now is not None and hidden_later is not None and weight_now is not None and weight_later is not None
    return exists, torch.equal(weight_now, weight_later), torch.equal(hidden_now, hidden_later)


def test_the_weight_gradient_of_the_loss_can_be_deferred() -> None:
    assert deferred_loss() == (False, True, True)


def test_labels_that_are_all_ignored_give_zero_loss_and_zero_gradients() -> None:
    hidden, weight, labels = loss_inputs(45, 25)
    table, leaf = table_of(weight, ParallelContext()), hidden.float().requires_grad_()
    loss = VocabParallelLoss(table.weight, ParallelContext())(leaf, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss.item() == 0 and leaf.grad is not None and not leaf.grad.any()
    assert table.weight.grad is not None and not table.weight.grad.any()


def test_a_frozen_output_layer_passes_gradients_on_and_has_none() -> None:
    hidden, weight, labels = loss_inputs(45, 25)
    table, leaf = table_of(weight, ParallelContext()), hidden.float().requires_grad_()
    table.weight.requires_grad_(False)
    VocabParallelLoss(table.weight, ParallelContext())(leaf, labels).backward(torch.tensor(0.5))
    assert table.weight.grad is None and leaf.grad is not None
    torch.testing.assert_close(leaf.grad, loss_of_torch(45, 0.0)[1].float(), rtol=2e-6, atol=5e-6)


def logits_of_rank(vocab_size: int, tensor: int) -> Tensor:
    parallel = parallel_context(tensor, False)
    hidden, weight, _ = loss_inputs(vocab_size, 25)
    return VocabParallelLoss(table_of(weight, parallel).weight, parallel).logits(hidden.float()).detach()


def test_logits_have_no_padding_entries(ranks: Pool) -> None:
    hidden, weight, _ = loss_inputs(45, 25)
    logits = torch.cat(ranks.run(4, logits_of_rank, 45, 4), -1)
    torch.testing.assert_close(logits, (hidden @ weight.t()).float(), rtol=2e-6, atol=5e-6)


def test_the_config_s_label_smoothing_reaches_the_loss_under_any_layout(ranks: Pool) -> None:
    smoothed = tiny_config(training={"label_smoothing": 0.2})
    plain, reference = ranks.run(1, train, tiny_config(), 2), ranks.run(1, train, smoothed, 2)
    assert abs(plain[0]["losses"][0] - reference[0]["losses"][0]) > 1e-2
    split = tiny_config(training={"label_smoothing": 0.2}, parallel={"tensor": 2, "pipeline": 2})
    results = ranks.run(4, train, split, 2)
    assert results[0]["losses"] == pytest.approx(reference[0]["losses"], rel=1e-5)
    assert results[0]["norms"] == pytest.approx(reference[0]["norms"], rel=1e-5)
