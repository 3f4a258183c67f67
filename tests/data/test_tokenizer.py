"""Tokenizer files by their own libraries' ids; what a file made for other ends must not change."""

from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from megagpt.data.tokenizer import gpt2_tokenizer, load_tokenizer
from megagpt.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared is absent")


def word_level(vocab: dict[str, int]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


def test_a_file_that_cuts_and_pads_encodes_documents_whole(tmp_path: Path) -> None:
    cutting = word_level({"a": 0, "</s>": 1, "[UNK]": 2})
    cutting.enable_truncation(3)
    cutting.enable_padding(length=8)
    cutting.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode_batch(["a a a a a", "a"]) == [[0] * 5, [0]]
    assert tokenizer.encode("a a") == [0, 0]


def test_the_vocabulary_size_is_above_every_id_even_where_ids_have_gaps(tmp_path: Path) -> None:
    word_level({"a": 0, "</s>": 1, "[UNK]": 9}).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).vocab_size == 10


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"])
def test_the_end_of_document_is_found_by_its_usual_names(tmp_path: Path, name: str) -> None:
    word_level({"[UNK]": 0, "a": 1, name: 2}).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).eod_id == 2


def test_a_file_without_an_end_of_document_is_refused(tmp_path: Path) -> None:
    word_level({"[UNK]": 0}).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no token that ends documents"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("name", ["broken.model", "broken.json"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("not a tokenizer")
    with pytest.raises(DataError, match=name):
        load_tokenizer(str(tmp_path / name))


@needs_shared
def test_sentencepiece_ids_are_the_library_s_own() -> None:
    path = SHARED / "spm" / "test_model.model"
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = (SHARED / "spm" / "botchan.txt").read_text().splitlines()[:50]
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encode_batch(texts) == [own.encode(text) for text in texts]
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (1000, own.eos_id())


@needs_shared
def test_megatron_s_vocabulary_reads_its_corpus_back_into_english() -> None:
    folder = SHARED / "megatron_indexed"
    tokenizer = gpt2_tokenizer(folder / "gpt2-tiny-vocab.json", folder / "gpt2-tiny-merges.txt")
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (5000, 4999)
    text = "The quick brown fox;\n\tcafé"
    assert tokenizer.decode(tokenizer.encode(text)) == text
