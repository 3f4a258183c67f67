"""One process equals Hugging Face's GPT2LMHeadModel with the same weights: logits, loss and gradients.

fp32; the same sums in another order: 1e-5 relative to the largest value.
"""

import pytest
import torch
import transformers
from support.cached import cached_logits
from support.gpt2_pair import gpt2_pair, to_megagpt
from support.runs import parameters_by_name, tiny_config

from megagpt.model.forward_context import MicroBatch
from megagpt.model.gpt import GPTChunk


@pytest.fixture(scope="module")
def models() -> tuple[GPTChunk, transformers.GPT2LMHeadModel, dict[str, torch.nn.Parameter]]:
    """megagpt's model, Hugging Face's model, and megagpt's parameters by name."""
    chunk, theirs = gpt2_pair(tiny_config(model={"activation": "gelu_tanh", "init_std": 0.3}))
    return chunk, theirs, parameters_by_name(chunk)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_logits_are_equal(models) -> None:
    chunk, theirs, _ = models
    tokens = torch.randint(0, 61, (3, 16))
    close(chunk.logits(tokens), theirs(tokens).logits)


def test_the_loss_and_every_gradient_are_equal(models) -> None:
    chunk, theirs, parameters = models
    tokens = torch.randint(0, 61, (3, 17))
    labels = tokens[:, 1:].clone()
    labels[0, :5] = -100
    count = int((labels != -100).sum())
    loss = chunk(None, MicroBatch(tokens[:, :-1], labels)) / count
    loss.backward()
    logits = theirs(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    theirs.zero_grad()
    expected.backward()
    close(loss.detach(), expected.detach())
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in to_megagpt(gradients, 4, 4).items():
        close(parameters[name].grad[: gradient.shape[0]], gradient)
    assert not parameters["embedding.token.weight"].grad[61:].any()  # padding entries learn nothing


def test_the_cache_gives_the_logits_of_the_full_text(models) -> None:
    chunk, _, _ = models
    chunk.eval()
    tokens = torch.randint(0, 61, (1, 12))
    with torch.no_grad():
        full = chunk.logits(tokens)
        pieces = cached_logits(chunk, tokens, [5, *[1] * 7])
    close(pieces, full[:, 4:])
