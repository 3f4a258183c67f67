"""Greedy and beam search write the targets of transformers, token for token, also for sources of different lengths."""

from typing import Any

import pytest
import torch
from support.encoder_decoder import hugging_face_t5, loaded_t5

from megagpt.inference.beam_search import BeamSearch, search
from megagpt.model.encoder_decoder import EncoderDecoderChunk

transformers = pytest.importorskip("transformers")
END = 1
SOURCES = [[5, 17, 33, 4, 1], [9, 60, 8, 8, 21, 7, 45, 2, 30, 11, 12, 1], [1], [44, 3, 59, 28, 28, 14, 6, 1]]


@pytest.fixture(scope="module", params=["v1.0", "v1.1"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[EncoderDecoderChunk, Any]:
    """The same model here and in transformers. Its end token is likely enough for short and long targets."""
    theirs = hugging_face_t5(request.param)
    return loaded_t5(theirs, tmp_path_factory.mktemp("t5")), theirs


def expected(theirs: Any, how: BeamSearch) -> list[tuple[int, ...]]:
    """Return what transformers writes, up to the end token."""
    longest = max(map(len, SOURCES))
    ids = torch.tensor([source + [0] * (longest - len(source)) for source in SOURCES])
    mask = torch.tensor([[1] * len(source) + [0] * (longest - len(source)) for source in SOURCES])
    options: dict[str, Any] = {"num_beams": how.beams, "max_new_tokens": how.max_tokens, "do_sample": False}
    if how.beams > 1:
        options |= {"length_penalty": how.length_penalty, "early_stopping": how.early_stopping}
    rows = theirs.generate(
        ids, attention_mask=mask, decoder_start_token_id=0, eos_token_id=END, pad_token_id=0, **options
    ).tolist()
    return [tuple(row[1 : row.index(END) + 1] if END in row else row[1 : how.max_tokens + 1]) for row in rows]


CASES = {
    "greedy": BeamSearch(max_tokens=12),
    "2 beams": BeamSearch(beams=2, max_tokens=12),
    "4 beams": BeamSearch(beams=4, max_tokens=12),
    "4 beams, long targets preferred": BeamSearch(beams=4, max_tokens=12, length_penalty=3.0),
    "4 beams, short targets preferred": BeamSearch(beams=4, max_tokens=12, length_penalty=-1.0),
    "3 beams, early stopping": BeamSearch(beams=3, max_tokens=12, early_stopping=True),
    "3 beams, no early stopping": BeamSearch(beams=3, max_tokens=12, early_stopping="never", length_penalty=0.5),
    "one token": BeamSearch(beams=3, max_tokens=1),
}


@pytest.mark.parametrize("name", CASES)
def test_targets_are_those_of_transformers(name: str, models: tuple[EncoderDecoderChunk, Any]) -> None:
    ours, theirs = models
    found = search(ours, SOURCES, CASES[name], {END})
    assert [target.tokens for target in found] == expected(theirs, CASES[name])


def test_the_cases_differ_and_some_targets_end_early(models: tuple[EncoderDecoderChunk, Any]) -> None:
    """Otherwise equal targets would show little."""
    ours, _ = models
    by_case = {name: tuple(target.tokens for target in search(ours, SOURCES, how, {END})) for name, how in CASES.items()}
    assert len(set(by_case.values())) >= 5
    lengths = {len(tokens) for targets in by_case.values() for tokens in targets}
    assert 12 in lengths and len(lengths) > 2


def test_a_target_does_not_depend_on_the_other_sources(models: tuple[EncoderDecoderChunk, Any]) -> None:
    ours, _ = models
    how = BeamSearch(beams=3, max_tokens=12)
    alone = [search(ours, [source], how, {END})[0].tokens for source in SOURCES]
    assert [target.tokens for target in search(ours, SOURCES, how, {END})] == alone


def test_ids_without_a_token_are_not_written(models: tuple[EncoderDecoderChunk, Any]) -> None:
    ours, _ = models
    found = search(ours, SOURCES, BeamSearch(beams=2, max_tokens=12), {END}, n_tokens=30)
    assert max(token for target in found for token in target.tokens) < 30
