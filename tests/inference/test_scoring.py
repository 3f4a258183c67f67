"""Scores of windows are sums of the log-probabilities of the full text, whatever else is in the batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.runs import full_model, tiny_config

from megagpt.inference import scoring
from megagpt.inference.scoring import Window, score, windows_of
from megagpt.model.gpt import GPTChunk


@pytest.fixture(scope="module")
def model() -> GPTChunk:
    return full_model(tiny_config(model={"init_std": 0.5, "position_embedding": "rotary", "attention_window": 5})).eval()


@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_every_token_but_the_first_is_scored_once_with_as_much_context_as_there_is_room_for(
    length: int, positions: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, positions))
    text = list(range(length))
    scored = []
    for window in windows_of(text, positions, stride):
        tokens = list(window.tokens)
        assert 0 < window.n_scored < len(tokens) <= positions + 1
        assert tokens == text[tokens[0] : tokens[-1] + 1]
        assert tokens[0] == 0 or len(tokens) == positions + 1
        scored += tokens[-window.n_scored :]
    assert scored == text[1:]


@torch.no_grad()
def test_scores_are_those_of_each_text_alone(model: GPTChunk, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 logits, summed in float64 on both sides: 1e-5 for up to 16 tokens. 40 tokens in a forward make several batches."""
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 40)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 61, (length,), generator=generator).tolist() for length in (17, 2, 9, 12, 3, 17)]
    windows = [Window(text, scored) for text, scored in zip(texts, (16, 1, 3, 11, 2, 1), strict=True)]
    greedy = [*texts[2][:-1], int(model.logits(torch.tensor([texts[2][:-1]]))[0, -1].argmax())]
    windows.append(Window(greedy, 1))
    results = score(model, windows)
    for window, result in zip(windows, results, strict=True):
        tokens = torch.tensor(window.tokens)
        logprobs = model.logits(tokens[None, :-1])[0].double().log_softmax(-1)
        picked = logprobs.gather(1, tokens[1:, None])[-window.n_scored :]
        assert result.logprob == pytest.approx(float(picked.sum()), abs=1e-5)
        assert result.is_greedy == bool((logprobs.argmax(-1) == tokens[1:])[-window.n_scored :].all())
    assert results[-1].is_greedy
