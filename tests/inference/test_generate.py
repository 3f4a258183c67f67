"""Tokens with the cache, and beyond the context, equal those of the full text without a cache; what cannot be is refused."""

import pytest
import torch
from support.runs import full_model, tiny_config

from megagpt.errors import ConfigError, TrainingError
from megagpt.inference.generate import generate
from megagpt.model.gpt import GPTChunk
from megagpt.model.kv_cache import KVCache

POSITIONS, VOCABULARY = 16, 61


@pytest.fixture(scope="module")
def model() -> GPTChunk:
    """A model with large random weights and an output layer of its own, so that its text does not repeat one token."""
    shape = {"n_positions": POSITIONS, "vocab_size": VOCABULARY, "init_std": 0.5, "tie_embeddings": False}
    return full_model(tiny_config(model=shape)).eval()


def greedy(model: GPTChunk, prompt: list[int], max_tokens: int, n_tokens: int | None = None) -> list[int]:
    return list(generate(model, prompt, max_tokens, 0, None, 0, None, n_tokens))


@torch.no_grad()
def expected_greedy(model: GPTChunk, prompt: list[int], max_tokens: int, n_tokens: int = VOCABULARY) -> list[int]:
    """The definition: the most likely token after the last `POSITIONS` tokens, one full forward per token."""
    text = list(prompt)
    for _ in range(max_tokens):
        text.append(int(model.logits(torch.tensor([text[-POSITIONS:]]))[0, -1, :n_tokens].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("length", [1, 3, POSITIONS - 1, POSITIONS, POSITIONS + 1, 5 * POSITIONS])
def test_greedy_tokens_within_and_beyond_the_context_equal_those_without_a_cache(length: int, model: GPTChunk) -> None:
    prompt = [(7 * n) % VOCABULARY for n in range(length)]
    tokens = greedy(model, prompt, 2 * POSITIONS + 5)
    assert tokens == expected_greedy(model, prompt, 2 * POSITIONS + 5)
    assert len(set(tokens[-POSITIONS:])) > 2  # else the window would make no difference


@torch.no_grad()
def test_logits_with_the_cache_equal_those_without(model: GPTChunk) -> None:
    """fp32, sums of 32 terms in another order: 1e-5."""
    tokens = torch.tensor([[5, 7, 11, 2, 9]])
    caches = {int(index): KVCache() for index in model.layers}
    cached = [model.next_token_logits(tokens[:, :3], caches)]
    cached += [model.next_token_logits(tokens[:, position : position + 1], caches) for position in (3, 4)]
    torch.testing.assert_close(torch.stack(cached, 1), model.logits(tokens)[:, 2:], rtol=0, atol=1e-5)


def test_generation_ends_before_the_end_token(model: GPTChunk) -> None:
    tokens = greedy(model, [5, 7, 11], 8)
    assert list(generate(model, [5, 7, 11], 8, 0, None, 0, end=tokens[0])) == []
    other = next(n for n, token in enumerate(tokens) if token != tokens[0])
    assert list(generate(model, [5, 7, 11], 8, 0, None, 0, end=tokens[other])) == tokens[:other]


@pytest.mark.parametrize(("temperature", "top_k"), [(0, None), (5.0, None), (5.0, 40), (1.0, 1)])
def test_ids_that_the_tokenizer_does_not_have_are_never_generated(
    temperature: float, top_k: int | None, model: GPTChunk
) -> None:
    def sample(n_tokens: int | None) -> list[int]:
        return [token for seed in range(4) for token in generate(model, [3], 40, temperature, top_k, seed, None, n_tokens)]

    assert max(sample(20)) < 20 <= max(sample(None))
    assert greedy(model, [3, 4], 10, 20) == expected_greedy(model, [3, 4], 10, 20)


def test_samples_depend_only_on_the_seed(model: GPTChunk) -> None:
    def sample(seed: int) -> list[int]:
        return list(generate(model, [3], 30, 1.0, None, seed, None))

    assert sample(1) == sample(1) != sample(2)


@torch.no_grad()
def test_samples_are_among_the_top_k_in_proportion_to_their_probabilities(model: GPTChunk) -> None:
    """4,000 draws; 5 standard deviations of a binomial share are at most 5 * 0.5 / sqrt(4000) = 0.04."""
    scores = model.logits(torch.tensor([[3]]))[0, -1] / 2.0
    values, ids = scores.topk(3)
    expected = dict(zip(ids.tolist(), values.softmax(0).tolist(), strict=True))
    draws = [next(generate(model, [3], 1, 2.0, 3, seed, None)) for seed in range(4000)]
    assert set(draws) == set(expected)
    for token, share in expected.items():
        assert draws.count(token) / len(draws) == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("temperature", [1e-42, 5e-324, 1e-5])
def test_a_tiny_temperature_selects_the_most_likely_token(temperature: float, model: GPTChunk) -> None:
    for top_k in (None, 5):
        assert list(generate(model, [3, 8], 10, temperature, top_k, 0, None)) == greedy(model, [3, 8], 10)


def test_a_huge_temperature_and_a_top_k_beyond_the_vocabulary_sample_from_all_tokens(model: GPTChunk) -> None:
    draws = [next(generate(model, [3], 1, 1e300, 10**9, seed, None)) for seed in range(400)]
    assert len(set(draws)) > VOCABULARY / 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "0 tokens; expected at least 1"),
        ([3, VOCABULARY, 99], f"token id {VOCABULARY} is not in the model's vocabulary of {VOCABULARY}"),
        ([-1], "token id -1 is not"),
    ],
)
def test_a_prompt_that_the_model_cannot_read_is_refused(prompt: list[int], message: str, model: GPTChunk) -> None:
    with pytest.raises(ConfigError, match=message):
        next(generate(model, prompt, 1, 0, None, 0, None))


def test_scores_that_are_not_finite_are_an_error_and_no_token() -> None:
    broken = full_model(tiny_config())
    with torch.no_grad():
        broken.norm.weight[3] = float("nan")
    for temperature in (0, 1.0):
        with pytest.raises(TrainingError, match="scores are not finite"):
            next(generate(broken, [1], 1, temperature, None, 0, None))
