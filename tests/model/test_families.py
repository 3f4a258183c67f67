"""Each family equals the model of Hugging Face transformers with the same weights: logits, loss, gradients, cached logits.

fp32; the same sums in another order: 2e-5 relative to the largest value.
"""

from typing import Any, NamedTuple

import pytest
import torch
from support.cached import cached_logits
from support.families import CASES, by_file_name, random_model
from support.runs import full_model, parameters_by_name, tiny_config

from megagpt.config import Config
from megagpt.hugging_face.families import FAMILIES
from megagpt.model.forward_context import MicroBatch
from megagpt.model.gpt import GPTChunk

pytest.importorskip("transformers")


class Models(NamedTuple):
    """The same model twice."""

    ours: GPTChunk
    config: Config
    theirs: Any
    family: str


@pytest.fixture(scope="module", params=CASES)
def models(request: pytest.FixtureRequest) -> Models:
    keys, model_type, _ = CASES[request.param]
    theirs = random_model(request.param)
    config = tiny_config(model=keys)
    ours = full_model(config).eval()
    parameters, state = parameters_by_name(ours), by_file_name(theirs.state_dict())
    with torch.no_grad():
        for name, value in converted(state, model_type, config).items():
            parameters[name][: value.shape[0]] = value
    return Models(ours, config, theirs, model_type)


def converted(tensors: dict[str, torch.Tensor], family: str, config: Config) -> dict[str, torch.Tensor]:
    """Return Hugging Face's tensors by megagpt's names."""
    rules = FAMILIES[family].rules(config.model)
    return {name: rule.to_megagpt([tensors[prefix + part] for part in rule.names]) for name, rule, prefix in rules}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_the_table_names_every_parameter_and_tensor_once(models: Models) -> None:
    rules = list(FAMILIES[models.family].rules(models.config.model))
    assert sorted(name for name, _, _ in rules) == sorted(parameters_by_name(models.ours))
    theirs = [prefix + part for _, rule, prefix in rules for part in rule.names]
    tied = {"lm_head.weight"} if models.config.model.tie_embeddings else set()
    assert sorted(theirs) == sorted(by_file_name(models.theirs.state_dict()).keys() - tied)


def test_the_rules_give_the_tensors_back_bit_for_bit(models: Models) -> None:
    state = by_file_name(models.theirs.state_dict())
    for _, rule, prefix in FAMILIES[models.family].rules(models.config.model):
        tensors = [state[prefix + part] for part in rule.names]
        for before, after in zip(tensors, rule.from_megagpt(rule.to_megagpt(tensors)), strict=True):
            assert torch.equal(before, after)


def test_logits_loss_and_every_gradient_are_equal(models: Models) -> None:
    tokens = torch.randint(0, 61, (3, 17))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    labels[0, :5] = -100
    count = int((labels != -100).sum())
    logits = models.theirs(inputs).logits
    close(models.ours.logits(inputs), logits)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss = models.ours(None, MicroBatch(inputs, labels)) / count
    close(loss.detach(), expected.detach())
    models.theirs.zero_grad()
    models.ours.zero_grad()
    expected.backward()
    loss.backward()
    parameters = parameters_by_name(models.ours)
    gradients = by_file_name({name: parameter.grad for name, parameter in models.theirs.named_parameters()})
    for name, gradient in converted(gradients, models.family, models.config).items():
        close(parameters[name].grad[: gradient.shape[0]], gradient)


def test_the_cache_gives_the_logits_of_the_full_text(models: Models) -> None:
    tokens = torch.randint(0, 61, (1, 12))
    with torch.no_grad():
        full = models.ours.logits(tokens)
        pieces = cached_logits(models.ours, tokens, [5, *[1] * 7])
    close(pieces, full[:, 4:])
