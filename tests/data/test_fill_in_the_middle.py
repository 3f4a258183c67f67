"""A transformed document is its prefix, suffix and middle with the tokens between them; all else stays."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.chat import chat_tokenizer

from megagpt.config import build_config
from megagpt.config.schema import DataConfig
from megagpt.data.blend import build_datasets
from megagpt.data.fill_in_the_middle import MIN_TOKENS, FillInTheMiddle, MiddleTokens, build_fill_in_the_middle
from megagpt.data.gpt_dataset import Sample
from megagpt.data.indexed import IndexedWriter
from megagpt.errors import ConfigError

PREFIX, MIDDLE, SUFFIX, END = 1001, 1002, 1003, 1000
TOKENS = MiddleTokens(PREFIX, MIDDLE, SUFFIX)


def transform(rate: float = 1.0, spm_share: float = 0.0, seed: int = 3) -> FillInTheMiddle:
    return FillInTheMiddle(rate, spm_share, TOKENS, END, seed)


def document(length: int, start: int = 0) -> Sample:
    starts = np.zeros(length, np.bool_)
    starts[0] = True
    return Sample(np.arange(start, start + length, dtype=np.int64), starts)


def parts(tokens: list[int]) -> tuple[list[int], list[int], list[int], bool]:
    """Return prefix, suffix, the rest behind the middle token, and whether the order is SPM."""
    assert tokens[0] == PREFIX
    suffix, middle = tokens.index(SUFFIX), tokens.index(MIDDLE)
    return tokens[1:suffix], tokens[suffix + 1 : middle], tokens[middle + 1 :], suffix == 1


@pytest.mark.parametrize("spm_share", [0.0, 1.0])
def test_the_document_can_be_put_together_again(spm_share: float) -> None:
    cuts = set()
    for index in range(200):
        original = document(40).tokens.tolist()
        prefix, suffix, rest, _ = parts(transform(spm_share=spm_share)(document(40), index).tokens.tolist())
        if spm_share:
            assert prefix == []
            assert rest + suffix == original[:-3]  # prefix and middle are together behind the suffix
        else:
            assert prefix + rest + suffix == original[:-3]
            cuts.add((len(prefix), len(prefix) + len(rest)))
    if not spm_share:  # uniform cuts: in the mean a third of the text is the prefix
        assert len(cuts) > 150
        assert np.mean([first for first, _ in cuts]) == pytest.approx(37 / 3, rel=0.15)
        assert np.mean([second for _, second in cuts]) == pytest.approx(2 * 37 / 3, rel=0.15)


@pytest.mark.parametrize(("rate", "spm_share"), [(0.5, 0.5), (0.9, 0.2), (0.1, 1.0)])
def test_rate_and_share_are_those_of_the_config(rate: float, spm_share: float) -> None:
    """4,000 draws: four standard deviations are below 0.032."""
    found = [transform(rate, spm_share)(document(20, 10), index).tokens.tolist() for index in range(4000)]
    changed = [tokens for tokens in found if tokens[0] == PREFIX]
    assert all(tokens == list(range(10, 30)) for tokens in found if tokens[0] != PREFIX)
    assert len(changed) / len(found) == pytest.approx(rate, abs=0.032)
    # A document with an empty prefix looks the same in both orders.
    spm = [tokens for tokens in changed if parts(tokens)[3]]
    expected = spm_share + (1 - spm_share) / 18 * (2 - 1 / 18)
    assert len(spm) / len(changed) == pytest.approx(expected, abs=0.1)


def test_documents_are_not_mixed_and_end_tokens_stay_last() -> None:
    sizes = [12, 30, MIN_TOKENS - 1, 25, 14]
    pieces = [np.append(np.arange(100 * n, 100 * n + size - 1), END) for n, size in enumerate(sizes)]
    pieces[-1] = np.arange(900, 900 + sizes[-1])  # cut off by the end of the sample
    tokens, starts = np.concatenate(pieces), np.zeros(sum(sizes), np.bool_)
    starts[np.cumsum(sizes)[:-1]] = True  # the first piece continues a document of the sample before
    result = transform(spm_share=0.5)(Sample(tokens, starts), 5)
    assert result.starts is starts
    for (start, stop), piece in zip(pairwise([0, *np.cumsum(sizes)]), pieces, strict=True):
        found = result.tokens[start:stop]
        text = [token for token in found.tolist() if token < 1000]
        if len(piece) < MIN_TOKENS:
            assert found.tolist() == piece.tolist()
            continue
        assert (found[0], found[-1] == END) == (PREFIX, piece[-1] == END)
        body = piece[piece < 1000].tolist()
        assert sorted(text) == body[:-3]


def test_the_result_depends_on_seed_and_index_only() -> None:
    once, again = (transform(0.5, 0.5)(document(50), 7).tokens.tolist() for _ in range(2))
    assert once == again
    others = [transform(1.0, 0.5, seed)(document(50), index).tokens.tolist() for seed, index in ((3, 7), (4, 7), (3, 8))]
    assert len({tuple(tokens) for tokens in others}) == 3


def corpus_with_tokenizer(folder: Path) -> dict[str, object]:
    """Write a corpus; return the data section of a config with three unused ids."""
    with IndexedWriter(folder / "x", np.uint16) as writer:
        for number in range(50):
            writer.add_document(np.append(np.full(60, number), 256))
    return {
        "train": str(folder / "x"),
        "valid": str(folder / "x"),
        "tokenizer": "byte",
        "fill_in_the_middle": {"rate": 1.0, "tokens": [257, 258, 259]},
    }


def test_only_the_training_data_is_transformed(tmp_path: Path) -> None:
    train, valid_sets, _ = build_datasets(DataConfig.model_validate(corpus_with_tokenizer(tmp_path)), 64)
    valid = valid_sets["eval"]
    assert {257, 258, 259} <= set(train.sample(0).tokens.tolist())
    assert train.sample(0).tokens.tolist() == train.sample(0).tokens.tolist()
    assert all(max(valid.sample(index).tokens) <= 256 for index in range(10))
    first_epoch, second = (train.sample(index).tokens.tolist() for index in (0, train.samples_per_epoch))
    assert first_epoch != second


def test_tokens_are_found_by_their_text_or_refused(tmp_path: Path) -> None:
    folder = str(chat_tokenizer(tmp_path, "thinking"))
    found = DataConfig.model_validate(
        {"tokenizer": folder, "fill_in_the_middle": {"rate": 0.5, "tokens": ["<think>", "<|im_end|>", "</think>"]}}
    )
    assert build_fill_in_the_middle(found) is not None
    missing = DataConfig.model_validate({"tokenizer": folder, "fill_in_the_middle": {"rate": 0.5}})
    with pytest.raises(ConfigError, match=r"tokens: <\|fim_prefix\|> is not a special token of data.tokenizer"):
        build_fill_in_the_middle(missing)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({}, "data.fill_in_the_middle.rate: needs data.tokenizer"),
        ({"tokenizer": "byte", "task": "chat"}, 'data.fill_in_the_middle.rate: has no meaning for data.task "chat"'),
    ],
)
def test_what_does_not_fit_together_is_refused(data: dict[str, object], problem: str) -> None:
    model = {"n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 8, "vocab_size": 300}
    training = {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1}
    with pytest.raises(ConfigError, match=problem):
        build_config({"model": model, "training": training, "data": {**data, "fill_in_the_middle": {"rate": 0.5}}})
