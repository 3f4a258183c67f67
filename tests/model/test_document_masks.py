"""Documents packed into a row, with positions and attention reset, equal each document in a row of its own.

fp32; the same sums in another order: 1e-5 relative to the largest value. Weights are large (init_std 0.3), so that
attention over the wrong tokens shows.
"""

from typing import Any

import pytest
import torch
from support.runs import Tree, full_model, parameters_by_name, tiny_config
from torch import Tensor

from megagpt.labels import IGNORED
from megagpt.model.forward_context import MicroBatch
from megagpt.model.gpt import GPTChunk

LENGTHS = [[1, 6, 1, 1, 8], [3, 14]]
"""Lengths of the documents in rows of 17 tokens: 16 inputs and the last label."""


def large_model(**sections: Tree) -> GPTChunk:
    return full_model(tiny_config(**{**sections, "model": {"init_std": 0.3, **sections.get("model", {})}}))


def token_rows() -> Tensor:
    """Return random tokens, [2, 17]."""
    return torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(3))


def packed(tokens: Tensor, reset_positions: bool = True, reset_attention: bool = True) -> MicroBatch:
    """Return the rows as one micro-batch, with positions and documents written out from LENGTHS."""
    positions = torch.tensor([[position for length in row for position in range(length)] for row in LENGTHS])
    documents = torch.tensor([[index for index, length in enumerate(row) for _ in range(length)] for row in LENGTHS])
    return MicroBatch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:].masked_fill(positions[:, 1:] == 0, IGNORED),
        samples=torch.tensor([5, 6]),
        positions=positions[:, :-1] if reset_positions else None,
        documents=documents[:, :-1] if reset_attention else None,
    )


def separate_documents(tokens: Tensor) -> list[tuple[int, slice, Tensor]]:
    """Return (row, range in the row, tokens [1, length]) of every document."""
    documents = []
    for row, lengths in enumerate(LENGTHS):
        end = 0
        for length in lengths:
            end += length
            span = slice(end - length, end)
            documents.append((row, span, tokens[row : row + 1, span]))
    return documents


def logits_of(model: GPTChunk, batch: MicroBatch) -> Tensor:
    with torch.no_grad():
        return model.loss.logits(model.hidden(batch.tokens, batch))


def take_gradients(model: GPTChunk) -> dict[str, Tensor | None]:
    """Return the gradients by name, and remove them from the parameters."""
    gradients = {name: parameter.grad for name, parameter in parameters_by_name(model).items()}
    model.zero_grad(set_to_none=True)
    return gradients


def close(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * expected.abs().max().item())


@pytest.mark.parametrize("precision, relative", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_logits_are_those_of_each_document_alone(precision: str, relative: float) -> None:
    model, tokens = large_model(training={"precision": precision}), token_rows()
    together = logits_of(model, packed(tokens))
    for row, span, document in separate_documents(tokens):
        logits = together[row : row + 1, span]
        with torch.no_grad():
            close(logits, model.logits(document)[:, : logits.shape[1]], relative)


@pytest.mark.parametrize("positions, attention", [(True, False), (False, True), (False, False)])
def test_without_one_of_the_resets_every_later_document_has_other_logits(positions: bool, attention: bool) -> None:
    model, tokens = large_model(), token_rows()
    together = logits_of(model, packed(tokens, positions, attention))
    for row, span, document in separate_documents(tokens):
        logits = together[row : row + 1, span]
        with torch.no_grad():
            difference = (logits - model.logits(document)[:, : logits.shape[1]]).abs().max()
        assert (difference < 1e-4) if span.start == 0 else (difference > 0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_not_a_bit_of_one_document_reaches_another(precision: str) -> None:
    model, tokens = large_model(training={"precision": precision}), token_rows()
    before = logits_of(model, packed(tokens))
    tokens[1, :3] = (tokens[1, :3] + 1) % 61  # the first document of the second row
    after = logits_of(model, packed(tokens))
    assert torch.equal(after[0], before[0]) and torch.equal(after[1, 3:], before[1, 3:])
    assert not torch.isclose(after[1, :3], before[1, :3]).all(-1).any()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_loss_and_every_gradient_are_the_sums_over_the_documents_alone(recompute: str) -> None:
    model, tokens = large_model(training={"recompute": recompute}), token_rows()
    loss = model(None, packed(tokens))
    loss.backward()
    gradients = take_gradients(model)
    expected = torch.zeros(())
    for _, _, document in separate_documents(tokens):
        if document.shape[1] > 1:  # a document of one token has nothing to predict
            document_loss = model(None, MicroBatch(document[:, :-1], document[:, 1:]))
            document_loss.backward()
            expected += document_loss.detach()
    close(loss.detach(), expected)
    for name, gradient in take_gradients(model).items():
        close(gradients[name], gradient)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_draws_the_dropout_of_the_forward_under_the_mask(recompute: str) -> None:
    dropout: Any = {"embd_pdrop": 0.2, "attn_pdrop": 0.2, "resid_pdrop": 0.2}
    results = []
    for setting in ("none", recompute):
        model = large_model(model=dropout, training={"recompute": setting})
        model(None, packed(token_rows())).backward()
        results.append(take_gradients(model))
    for name, gradient in results[0].items():
        close(results[1][name], gradient)


@pytest.mark.parametrize("precision, itemsize", [("fp32", 4), ("bf16", 2)])
def test_all_layers_save_one_mask_in_the_precision_of_the_scores(precision: str, itemsize: int) -> None:
    model, batch = large_model(training={"precision": precision}), packed(token_rows())
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] == (16, 16):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(None, batch)
    assert list(sizes.values()) == [2 * 16 * 16 * itemsize]  # bytes: batch x seq x seq
