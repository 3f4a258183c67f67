"""Sources and targets of span corruption have the published sizes, and together give the text back."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from support.runs import corpus

from megagpt.config.schema import DataConfig, ModelConfig, SpanCorruptionConfig
from megagpt.data.blend import build_datasets
from megagpt.data.encoder_samples import EncoderFormat, encoder_format
from megagpt.data.gpt_dataset import Sample
from megagpt.data.span_corruption import (
    PrefixLM,
    SpanCorruption,
    largest_span_lengths,
    required_vocab_size,
    sentinel_ids,
    span_lengths,
)
from megagpt.data.tokenizer import load_tokenizer
from megagpt.errors import ConfigError
from megagpt.labels import IGNORED

END, START = 1, 0
SENTINELS = np.arange(2000, 1900, -1)


def piece(length: int) -> Sample:
    """Return a piece of different tokens, and one token more."""
    return Sample(np.arange(100, 101 + length), np.zeros(length + 1, np.bool_))


def parts(sample: Sample, end: int = END) -> tuple[list[int], list[int]]:
    """Return source and target without padding and end; they are padded and shifted as the model needs them."""
    assert sample.source is not None and sample.labels is not None
    target = sample.labels[sample.labels != IGNORED]
    assert sample.tokens[0] == START and np.array_equal(sample.tokens[1 : len(target) + 1], target)
    assert not sample.tokens[len(target) + 1 :].any() and not sample.source[sample.source_length :].any()
    source = sample.source[: sample.source_length].tolist()
    assert source[-1] == end and target[-1] == end
    return source[:-1], target.tolist()[:-1]


def restored(source: list[int], target: list[int], sentinels: set[int]) -> list[int]:
    """Return the text: each sentinel of the source replaced by what follows it in the target."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in sentinels:
            current = spans[token] = []
        else:
            current.append(token)
    return [token for one in source for token in (spans[one] if one in sentinels else [one])]


def test_t5s_source_of_512_tokens_is_made_of_568_and_its_target_has_114() -> None:
    """The numbers of the paper's code, which prints them; see also arXiv 1910.10683, section 3.1.4."""
    lengths = largest_span_lengths(512, 10_000, 0.15, 3.0)
    assert lengths is not None and (lengths.text, lengths.source, lengths.target) == (568, 512, 114)
    assert largest_span_lengths(512, 114, 0.15, 3.0) == lengths


@pytest.mark.parametrize("density", [0.05, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("mean_length", [1.0, 3.0, 10.0])
def test_the_largest_piece_fits_and_the_next_one_does_not(density: float, mean_length: float) -> None:
    for source, target in ((8, 8), (64, 32), (100, 1000), (33, 5)):
        lengths = largest_span_lengths(source, target, density, mean_length)
        assert lengths is not None and lengths.source <= source and lengths.target <= target
        larger = span_lengths(lengths.text + 1, density, mean_length)
        assert larger.source > source or larger.target > target


@pytest.mark.parametrize(("source", "target"), [(64, 64), (64, 12), (16, 64), (4, 4)])
def test_source_and_target_together_are_the_text(source: int, target: int) -> None:
    lengths = largest_span_lengths(source, target, 0.15, 3.0)
    assert lengths is not None
    transform = SpanCorruption(lengths, SENTINELS, END, target, EncoderFormat(source, START), seed=3)
    used = set()
    for index in range(100):
        sample = transform(piece(lengths.text), index)
        one, other = parts(sample)
        assert (len(one) + 1, len(other) + 1) == (lengths.source, lengths.target)
        expected = SENTINELS[: lengths.spans].tolist()
        assert [t for t in one if t > 1900] == expected and [t for t in other if t > 1900] == expected
        assert restored(one, other, set(expected)) == list(range(100, 100 + lengths.text))
        used.add(tuple(one))
    assert len(used) > (50 if lengths.spans > 1 else 0)  # a single span is the end of the piece


def test_spans_are_uniform_compositions() -> None:
    """6 tokens in 3 spans: 10 compositions, each in a tenth of 4,000 draws within 4 standard deviations."""
    lengths = span_lengths(24, 0.25, 2.0)
    assert (lengths.noise, lengths.spans) == (6, 3)
    transform = SpanCorruption(lengths, SENTINELS, END, 32, EncoderFormat(32, START), seed=3)
    found: Counter[tuple[int, ...]] = Counter()
    for index in range(4000):
        target = parts(transform(piece(24), index))[1]
        places = [place for place, token in enumerate(target) if token > 1900] + [len(target)]
        found[tuple(np.diff(places) - 1)] += 1
    assert len(found) == 10 and all(abs(count - 400) < 4 * 19 for count in found.values())


def test_a_sample_depends_on_seed_and_number_only() -> None:
    lengths = span_lengths(100, 0.15, 3.0)

    def source_of(index: int, seed: int) -> list[int]:
        return parts(SpanCorruption(lengths, SENTINELS, END, 64, EncoderFormat(128, START), seed)(piece(100), index))[0]

    assert source_of(5, 1) == source_of(5, 1)
    assert source_of(5, 1) != source_of(6, 1) and source_of(5, 1) != source_of(5, 2)


@pytest.mark.parametrize(("positions", "length"), [(32, 32), (32, 8), (8, 32)])
def test_a_prefix_and_its_continuation_are_the_text_cut_anywhere(positions: int, length: int) -> None:
    transform = PrefixLM(END, length, EncoderFormat(positions, START), seed=3)
    cuts = Counter()
    for index in range(2000):
        source, target = parts(transform(piece(positions), index))
        assert source + target == list(range(100, 100 + positions)) and len(target) < length
        cuts[len(source)] += 1
    expected = range(max(1, positions - length + 1), positions)
    assert sorted(cuts) == list(expected)
    assert max(cuts.values()) < 2000 / len(expected) + 5 * (2000 / len(expected)) ** 0.5


def data_config(folder: Path, task: str, **keys: object) -> DataConfig:
    return DataConfig.model_validate({"train": corpus(folder), "tokenizer": "byte", "task": task, **keys})


def model(encoder_positions: int, n_positions: int) -> ModelConfig:
    shape = {"n_layer": 1, "n_embd": 8, "n_head": 1, "encoder_layers": 1, "vocab_size": 500}
    return ModelConfig.model_validate({**shape, "n_positions": n_positions, "encoder_positions": encoder_positions})


@pytest.mark.parametrize("task", ["span_corruption", "prefix_lm"])
def test_every_token_of_an_epoch_is_read_once_and_each_epoch_differs(task: str, tmp_path: Path) -> None:
    data = data_config(tmp_path, task)
    train = build_datasets(data, 16, encoder_format(model(32, 16))).train
    sentinels = set(sentinel_ids(data, load_tokenizer("byte")).tolist()) if task == "span_corruption" else set()
    epoch: Counter[int] = Counter()
    for index in range(train.samples_per_epoch):
        source, target = parts(train.sample(index), load_tokenizer("byte").eod_id)
        epoch.update(restored(source, target, sentinels) if sentinels else source + target)
    stream = Counter(np.fromfile(f"{data.train}.bin", np.uint16).tolist())
    assert epoch <= stream  # and only the last incomplete piece is missing
    assert stream.total() - epoch.total() < epoch.total() / train.samples_per_epoch + 1
    samples = [train.sample(index).source for index in (0, train.samples_per_epoch)]
    assert not np.array_equal(samples[0], samples[1])


def test_the_sentinels_are_the_tokenizers_or_follow_its_ids_as_in_t5(tmp_path: Path) -> None:
    byte = load_tokenizer("byte")
    data = DataConfig(task="span_corruption", span_corruption=SpanCorruptionConfig(sentinels=3))
    assert sentinel_ids(data, byte).tolist() == [byte.vocab_size + 2, byte.vocab_size + 1, byte.vocab_size]
    assert required_vocab_size(data, byte) == byte.vocab_size + 3
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 2}, unk_token="[UNK]"))
    own.add_special_tokens(["<extra_id_1>", "<extra_id_0>"])
    own.save(str(tmp_path / "tokenizer.json"))
    assert sentinel_ids(data, load_tokenizer(str(tmp_path))).tolist() == [4, 3]
    assert required_vocab_size(data, load_tokenizer(str(tmp_path))) == 5


@pytest.mark.parametrize(
    ("task", "positions", "length", "sentinels", "message"),
    [
        ("span_corruption", 2, 2, 100, "model.encoder_positions: 2 .and model.n_positions 2. have no room"),
        ("span_corruption", 512, 114, 27, "data.span_corruption.sentinels: 27 are too few for the 28 spans of a source of 512"),
        ("prefix_lm", 1, 8, 100, "model.encoder_positions: 1 and model.n_positions 8 have no room"),
    ],
)
def test_settings_without_room_are_named(
    task: str, positions: int, length: int, sentinels: int, message: str, tmp_path: Path
) -> None:
    data = data_config(tmp_path, task, span_corruption={"sentinels": sentinels})
    with pytest.raises(ConfigError, match=message):
        build_datasets(data, length, encoder_format(model(positions, length)))
