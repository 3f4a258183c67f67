"""Tokens are drawn from the distribution that transformers' own processors give, in proportion to their probabilities."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from megagpt.inference.sampling import Sampler, Sampling, most_likely_share, penalised

SCORES = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 3
SEEN = [3, 3, 7, 12, 39]


def draw(sampling: Sampling, scores: torch.Tensor = SCORES, seen: list[int] = SEEN) -> int:
    return Sampler(sampling).draw(scores, seen).token


@pytest.mark.parametrize(
    "keys",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.7, "min_p": 0.1, "repetition_penalty": 1.3},
        {"top_p": 1e-9},
        {"top_k": 1},
    ],
    ids=str,
)
def test_the_draws_follow_the_distribution_of_transformers(keys: dict) -> None:
    """3,000 draws; 5 standard deviations of a binomial share are at most 5 * 0.5 / sqrt(3000) = 0.046."""
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    sampling, scores = Sampling(**keys), SCORES.double()[None]
    processors = [
        (sampling.repetition_penalty != 1, logits_process.RepetitionPenaltyLogitsProcessor, sampling.repetition_penalty),
        (True, logits_process.TemperatureLogitsWarper, float(sampling.temperature)),
        (sampling.top_k is not None, logits_process.TopKLogitsWarper, sampling.top_k),
        (sampling.top_p < 1, logits_process.TopPLogitsWarper, sampling.top_p),
        (sampling.min_p > 0, logits_process.MinPLogitsWarper, sampling.min_p),
    ]
    for used, kind, value in processors:
        if used:
            scores = kind(value)(torch.tensor([SEEN]), scores)
    expected = scores[0].softmax(-1)
    counts = Counter(draw(replace(sampling, seed=seed)) for seed in range(3000))
    assert set(counts) <= set(expected.nonzero().flatten().tolist())
    for token, probability in enumerate(expected.tolist()):
        assert counts[token] / 3000 == pytest.approx(probability, abs=0.046)


def test_a_sampler_goes_on_with_its_own_random_numbers() -> None:
    """A second draw with the first one's numbers would repeat it."""
    sampler = Sampler(Sampling(seed=1))
    flat = torch.zeros(1000)
    draws = [sampler.draw(flat, []).token for _ in range(10)]
    assert len(set(draws)) > 5
    again = Sampler(Sampling(seed=1))
    assert draws == [again.draw(flat, []).token for _ in range(10)]


@pytest.mark.parametrize("temperature", [1e-42, 5e-324, 1e-5, 0])
def test_a_tiny_temperature_selects_the_most_likely_token(temperature: float) -> None:
    for top_k in (None, 5):
        assert draw(Sampling(temperature=temperature, top_k=top_k), seen=[]) == int(SCORES.argmax())


def test_a_huge_temperature_and_a_top_k_beyond_the_vocabulary_sample_from_all_tokens() -> None:
    draws = [draw(Sampling(temperature=1e300, top_k=10**9, seed=seed)) for seed in range(400)]
    assert len(set(draws)) == 40


def test_the_penalty_acts_on_greedy_tokens_and_once_for_a_repeated_one() -> None:
    scores = torch.tensor([4.0, 3.9, -1.0])
    assert draw(Sampling(temperature=0, repetition_penalty=2.0), scores, [0, 0]) == 1
    assert penalised(scores, [0, 0, 2], 2.0).tolist() == [2.0, pytest.approx(3.9), -2.0]
    assert penalised(scores, [99], 2.0).tolist() == scores.tolist()  # a token beyond the tokenizer, in a prompt


def test_the_share_keeps_the_token_that_reaches_it() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.4])
    assert most_likely_share(probabilities, 0.5).tolist() == pytest.approx([0, 0.5, 0])
    assert most_likely_share(probabilities, 0.51).tolist() == pytest.approx([0, 0.5, 0.4])
    assert most_likely_share(probabilities, 0.95).tolist() == pytest.approx([0.1, 0.5, 0.4])
