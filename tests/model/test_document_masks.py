"""Documents packed into a row, with positions and attention reset, against each document in a row of its own.

fp32; the same sums in another order: 1e-5 relative to the largest value. Weights are large (init_std 0.3), so that
attention over the wrong tokens shows.
"""

from typing import Any

import pytest
import torch
from support.runs import Tree, tiny_config
from torch import Tensor

from megagpt.model.gpt import GPTChunk, MicroBatch, build_chunk
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.embedding import IGNORED
from megagpt.parallel.parameter import ParallelContext, shard_of

LENGTHS = [[1, 6, 1, 1, 8], [3, 14]]
"""Of the documents in rows of 17 tokens: 16 inputs and the last label."""


def model(**sections: Tree) -> GPTChunk:
    config = tiny_config(**{**sections, "model": {"init_std": 0.3, **sections.get("model", {})}})
    return build_chunk(config, ParallelContext(DeferredGradients()), range(config.model.n_layer))


def rows() -> Tensor:
    """[2, 17]"""
    return torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(3))


def packed(tokens: Tensor, positions: bool = True, documents: bool = True) -> MicroBatch:
    """Written out from LENGTHS, one document after the other."""
    places = torch.tensor([[place for length in row for place in range(length)] for row in LENGTHS])
    numbers = torch.tensor([[number for number, length in enumerate(row) for _ in range(length)] for row in LENGTHS])
    labels = tokens[:, 1:].masked_fill(places[:, 1:] == 0, IGNORED)
    return MicroBatch(tokens[:, :-1], labels, 5, places[:, :-1] if positions else None, numbers[:, :-1] if documents else None)


def alone(tokens: Tensor) -> list[tuple[int, slice, Tensor]]:
    """(row, its place in the row, tokens [1, length]) of every document."""
    found = []
    for row, lengths in enumerate(LENGTHS):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        found += [
            (row, slice(end - n, end), tokens[row : row + 1, end - n : end]) for n, end in zip(lengths, ends, strict=True)
        ]
    return found


def logits(ours: GPTChunk, batch: MicroBatch) -> Tensor:
    with torch.no_grad():
        return ours.loss.logits(ours.hidden(batch.tokens, batch))


def gradients(ours: GPTChunk) -> dict[str, Tensor]:
    """By name; the parameters are left without any."""
    found = {shard_of(parameter).name: parameter.grad for parameter in ours.parameters()}
    ours.zero_grad(set_to_none=True)
    return found


def close(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * expected.abs().max().item())


@pytest.mark.parametrize("precision, relative", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_logits_are_those_of_each_document_alone(precision: str, relative: float) -> None:
    ours, tokens = model(training={"precision": precision}), rows()
    together = logits(ours, packed(tokens))
    for row, place, document in alone(tokens):
        found = together[row : row + 1, place]
        with torch.no_grad():
            close(found, ours.logits(document)[:, : found.shape[1]], relative)


@pytest.mark.parametrize("positions, documents", [(True, False), (False, True), (False, False)])
def test_without_one_of_the_resets_every_later_document_has_other_logits(positions: bool, documents: bool) -> None:
    ours, tokens = model(), rows()
    together = logits(ours, packed(tokens, positions, documents))
    for row, place, document in alone(tokens):
        found = together[row : row + 1, place]
        with torch.no_grad():
            difference = (found - ours.logits(document)[:, : found.shape[1]]).abs().max()
        assert (difference < 1e-4) if place.start == 0 else (difference > 0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_not_a_bit_of_one_document_reaches_another(precision: str) -> None:
    ours, tokens = model(training={"precision": precision}), rows()
    before = logits(ours, packed(tokens))
    tokens[1, :3] = (tokens[1, :3] + 1) % 61  # the first document of the second row
    after = logits(ours, packed(tokens))
    assert torch.equal(after[0], before[0]) and torch.equal(after[1, 3:], before[1, 3:])
    assert not torch.isclose(after[1, :3], before[1, :3]).all(-1).any()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_loss_and_every_gradient_are_the_sums_over_the_documents_alone(recompute: str) -> None:
    ours, tokens = model(training={"recompute": recompute}), rows()
    loss = ours(None, packed(tokens))
    loss.backward()
    found = gradients(ours)
    expected = torch.zeros(())
    for _, _, document in alone(tokens):
        if document.shape[1] > 1:  # a document of one token has nothing to predict
            part = ours(None, MicroBatch(document[:, :-1], document[:, 1:]))
            part.backward()
            expected += part.detach()
    close(loss.detach(), expected)
    for name, gradient in gradients(ours).items():
        close(found[name], gradient)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_finds_the_dropout_of_the_forward_under_the_mask(recompute: str) -> None:
    dropout: Any = {"embd_pdrop": 0.2, "attn_pdrop": 0.2, "resid_pdrop": 0.2}
    found = []
    for kind in ("none", recompute):
        ours = model(model=dropout, training={"recompute": kind})
        ours(None, packed(rows())).backward()
        found.append(gradients(ours))
    for name, gradient in found[0].items():
        close(found[1][name], gradient)


@pytest.mark.parametrize("precision, width", [("fp32", 4), ("bf16", 2)])
def test_all_layers_keep_one_mask_in_the_precision_of_the_scores(precision: str, width: int) -> None:
    ours, batch = model(training={"precision": precision}), packed(rows())
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] == (16, 16):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(None, batch)
    assert list(sizes.values()) == [2 * 16 * 16 * width]  # bytes: batch x seq x seq
