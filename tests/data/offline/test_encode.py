"""gigatoken gives the ids of the reference libraries; a difference ends the run before it is written."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megagpt.commands import train_tokenizer
from megagpt.data.offline import encode
from megagpt.data.offline.encode import PROBES, Encoded, GigatokenEncoder, ReferenceEncoder, SpotCheck, fast_encoder
from megagpt.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megagpt.errors import DataError

SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    """Train a byte-level BPE with a special token."""
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|endoftext|>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(), "Grüße 世界 don't we'll 1234 " * 20], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(str(folder / "tokenizer.json"))
    assert isinstance(loaded, HuggingFaceTokenizer)
    return loaded


@pytest.fixture(scope="module")
def sentencepiece_bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("spm")
    (folder / "a.txt").write_text(Path(__file__).read_text() * 2)
    assert train_tokenizer.main(["--input", str(folder / "a.txt"), "--output", str(folder / "t"), "--vocab-size", "400"]) == 0
    return load_tokenizer(str(folder / "t.model"))


def assigned(character: str) -> bool:
    """Return whether Unicode 3.2 has the character: the libraries implement different, newer versions of Unicode."""
    return unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cs")


PIECES = st.one_of(
    st.characters(exclude_categories=("Cs",)).filter(assigned),
    st.text(st.sampled_from(" \t\n\r\x0b\x0c\x85\u00a0\u2028\u3000\u200b"), min_size=1, max_size=12),
    st.text(st.characters(max_codepoint=0x1F), min_size=1, max_size=4),
    st.sampled_from(
        [
            "'s",
            "'re",
            "'LL",
            "don't",
            "<|endoftext|>",
            "<|endof",
            "</s>",
            "1234567",
            "½٣",
            "\U0001f600\u200d\U0001f469",
            "▁",
            "Ġ",
            "e\u0301",
        ]
    ),
    st.integers(1, 700).map(lambda n: "a" * n),
    st.integers(1, 300).map(lambda n: "ab-" * n),
)
DOCUMENTS = st.lists(st.lists(PIECES, max_size=25).map("".join), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def fast_bpe(bpe: HuggingFaceTokenizer) -> GigatokenEncoder:
    return gigatoken_of(bpe)


@pytest.fixture(scope="module")
def gpt2() -> tuple[Tokenizer, GigatokenEncoder]:
    tokenizer = load_tokenizer(str(SHARED / "gpt2"))
    return tokenizer, gigatoken_of(tokenizer)


def gigatoken_of(tokenizer: Tokenizer) -> GigatokenEncoder:
    encoder = fast_encoder(tokenizer, 2)
    assert isinstance(encoder, GigatokenEncoder)
    return encoder


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS)
@example(["", "a", ""])
def test_ids_of_any_text_equal_those_of_the_reference_library(
    bpe: HuggingFaceTokenizer, fast_bpe: GigatokenEncoder, documents: list[str]
) -> None:
    encoded = fast_bpe([text.encode() for text in documents])
    assert [encoded.document(n) for n in range(len(documents))] == bpe.encode_batch(documents)


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent")
@settings(max_examples=150, deadline=None)
@given(DOCUMENTS)
def test_gpt2_ids_of_any_text_equal_those_of_the_reference_library(
    gpt2: tuple[Tokenizer, GigatokenEncoder], documents: list[str]
) -> None:
    tokenizer, encoder = gpt2
    encoded = encoder([text.encode() for text in documents])
    assert [encoded.document(n) for n in range(len(documents))] == tokenizer.encode_batch(documents)


@pytest.fixture(scope="module")
def fast_sentencepiece(sentencepiece_bpe: Tokenizer) -> GigatokenEncoder:
    return gigatoken_of(sentencepiece_bpe)


@settings(max_examples=100, deadline=None)
@given(DOCUMENTS)
def test_sentencepiece_bpe_ids_of_any_text_equal_those_of_its_library(
    sentencepiece_bpe: Tokenizer, fast_sentencepiece: GigatokenEncoder, documents: list[str]
) -> None:
    encoded = fast_sentencepiece([text.encode() for text in documents])
    assert [encoded.document(n) for n in range(len(documents))] == sentencepiece_bpe.encode_batch(documents)


def test_the_byte_encoder_uses_bytes_as_ids() -> None:
    encoder = fast_encoder(ByteTokenizer(), 1)
    assert encoder is not None
    encoded = encoder(["é".encode(), b"", b"ab"])
    assert encoded.ids.tolist() == [0xC3, 0xA9, 97, 98] and encoded.sizes.tolist() == [2, 0, 2]


@pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent")
def test_a_unigram_model_is_encoded_by_its_own_library() -> None:
    assert fast_encoder(load_tokenizer(str(SHARED / "spm" / "test_model.model")), 2) is None


class DifferentTokenizer(HuggingFaceTokenizer):
    """A tokenizer whose first id differs from its own file, and so from gigatoken, for texts that contain `character`."""

    character: str

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        documents = super().encode_batch(texts)
        return [[ids[0] + 1, *ids[1:]] if self.character in text else ids for text, ids in zip(texts, documents, strict=True)]


def test_a_tokenizer_whose_ids_differ_from_gigatoken_on_a_probe_is_encoded_by_its_own_library(
    bpe: HuggingFaceTokenizer,
) -> None:
    different = DifferentTokenizer(tokenizers.Tokenizer.from_str(bpe.to_json()), bpe.source)
    different.character = "世"
    assert not any("世" in probe for probe in PROBES) and any("日" in probe for probe in PROBES)
    assert fast_encoder(different, 2) is not None
    different.character = "日"
    assert fast_encoder(different, 2) is None


def test_a_compared_document_with_another_id_is_an_error_that_shows_its_text(bpe: HuggingFaceTokenizer) -> None:
    texts = [b"one", b"two", "drei und ß".encode(), b"four"]
    correct = ReferenceEncoder(lambda: bpe)(texts)
    check = SpotCheck(bpe, 1.0)
    check(texts, correct)
    assert check.checked == 4
    ids = correct.ids.copy()
    ids[int(correct.sizes[:2].sum()) + 1] += 1
    with pytest.raises(DataError, match=r"document 6 \(counted from 0\): .*differ at token 1: .*--reference.*'drei und ß'"):
        check(texts, Encoded(ids, correct.sizes))


@pytest.mark.parametrize("share, expected", [(0.0, 0), (0.25, 25), (1.0, 100), (0.001, 1)])
def test_the_given_share_of_the_documents_is_compared(bpe: HuggingFaceTokenizer, share: float, expected: int) -> None:
    check, reference = SpotCheck(bpe, share), ReferenceEncoder(lambda: bpe)
    for size in (1, 30, 69):
        texts = [b"text %d" % n for n in range(size)]
        check(texts, reference(texts))
    assert check.checked == expected


def test_long_documents_are_compared_only_if_all_documents_are(
    bpe: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "MAX_CHECKED_BYTES", 10)
    texts = [b"short", b"short", b"a long document", b"short"]
    encoded = ReferenceEncoder(lambda: bpe)(texts)
    for share, expected in ((0.5, 1), (1.0, 4)):
        check = SpotCheck(bpe, share)
        check(texts, encoded)
        assert check.checked == expected
