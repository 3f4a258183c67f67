"""Ids equal those of the library that a tokenizer file belongs to; settings for fine-tuning do not change them."""

import json
import os
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


def test_truncation_and_padding_declared_in_a_file_are_ignored(tmp_path: Path) -> None:
    truncating = word_level({"a": 0, "</s>": 1, "[UNK]": 2})
    truncating.enable_truncation(3)
    truncating.enable_padding(length=8)
    truncating.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode_batch(["a a a a a", "a"]) == [[0] * 5, [0]]
    assert tokenizer.encode("a a") == [0, 0]


def test_the_vocabulary_size_is_above_every_id_even_if_ids_have_gaps(tmp_path: Path) -> None:
    word_level({"a": 0, "</s>": 1, "[UNK]": 9}).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).vocab_size == 10


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"])
def test_the_end_of_document_token_is_found_by_its_usual_names(tmp_path: Path, name: str) -> None:
    word_level({"[UNK]": 0, "a": 1, name: 2}).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).eod_id == 2


@pytest.mark.parametrize("declared", ["<stop>", {"content": "<stop>", "lstrip": False}])
def test_the_end_of_document_token_that_a_tokenizer_config_declares_comes_first(tmp_path: Path, declared: object) -> None:
    word_level({"[UNK]": 0, "</s>": 1, "<stop>": 2}).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).eod_id == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": declared}))
    assert load_tokenizer(str(tmp_path)).eod_id == 2


def test_a_declared_end_of_document_token_that_the_vocabulary_lacks_is_refused(tmp_path: Path) -> None:
    word_level({"[UNK]": 0, "</s>": 1}).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    with pytest.raises(DataError, match="no token that ends documents; expected <stop>"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_encodes_at_random_is_refused(tmp_path: Path) -> None:
    vocab = {"a": 0, "b": 1, "ab": 2, "</s>": 3}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b")], dropout=0.1)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"tokenizer.json: BPE dropout 0.1 encodes at random; remove it from the file"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_file_without_an_end_of_document_token_is_refused(tmp_path: Path) -> None:
    word_level({"[UNK]": 0}).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no token that ends documents"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("name", ["broken.model", "broken.json"])
def test_a_file_that_is_not_a_tokenizer_is_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("not a tokenizer")
    with pytest.raises(DataError, match=name):
        load_tokenizer(str(tmp_path / name))


def train_sentencepiece(folder: Path, **options: int) -> Path:
    """Train a tiny SentencePiece model."""
    (folder / "text.txt").write_text("the cat sat on the mat\n" * 50)
    settings = {"vocab_size": 30, "hard_vocab_limit": False, "minloglevel": 2, "control_symbols": ["<stop>"], **options}
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "text.txt"), model_prefix=str(folder / "own"), **settings)
    return folder / "own.model"


def test_a_special_tokens_map_declares_the_end_of_document_token_if_no_tokenizer_config_does(tmp_path: Path) -> None:
    word_level({"[UNK]": 0, "</s>": 1, "<stop>": 2}).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert load_tokenizer(str(tmp_path)).eod_id == 2


def test_gpt2_files_may_declare_their_end_of_document_token(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "<|endoftext|>": 1, "<stop>": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert load_tokenizer(str(tmp_path)).eod_id == 1
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    assert load_tokenizer(str(tmp_path)).eod_id == 2


def test_a_sentencepiece_model_without_an_end_piece_takes_the_declared_one(tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path, eos_id=-1)
    with pytest.raises(DataError, match=r"own.model: has no end-of-sentence piece, .* or name it in a tokenizer_config.json"):
        load_tokenizer(str(path))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert load_tokenizer(str(path)).eod_id == model.piece_to_id("<stop>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}')
    with pytest.raises(DataError, match="own.model: has no piece <gone>"):
        load_tokenizer(str(path))


def test_the_end_piece_of_a_sentencepiece_model_comes_before_a_declared_one(tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path, eos_id=2)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    assert load_tokenizer(str(path)).eod_id == 2
    path.rename(tmp_path / "tokenizer.model")
    assert load_tokenizer(str(tmp_path)).eod_id == 2  # a folder with a tokenizer.model


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000])
def test_a_declaration_that_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    word_level({"[UNK]": 0, "</s>": 1}).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(DataError, match="tokenizer_config.json: expected a JSON object"):
        load_tokenizer(str(tmp_path))


def test_an_id_that_no_vocabulary_has_is_refused(tmp_path: Path) -> None:
    word_level({"[UNK]": 0, "</s>": 2**24}).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="tokenizer.json: its largest token id is 16777216; expected below 16777216"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("model", [tokenizers.models.WordPiece, tokenizers.models.WordLevel])
def test_a_tokenizer_without_its_token_for_unknown_words_is_refused(tmp_path: Path, model: type) -> None:
    tokenizers.Tokenizer(model({"a": 0, "</s>": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"^[^\n]*tokenizer.json: cannot encode a text: [^\n]*$"):
        load_tokenizer(str(tmp_path))


def test_a_regular_expression_that_takes_too_long_is_an_error_of_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The library's Rust code panics: it prints lines of its own, and its exception is no `Exception`."""
    tokenizer = word_level({"[UNK]": 0, "</s>": 1})
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"((a+)+)+$d"), "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"^[^\n]*tokenizer.json: cannot encode a text: [^\n]*$"):
        load_tokenizer(str(tmp_path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("length", "accepted"), [(10, True), (11, False), (10_000, False)])
def test_a_normalizer_that_lengthens_a_text_too_much_is_refused(length: int, accepted: bool, tmp_path: Path) -> None:
    tokenizer = word_level({"[UNK]": 0, "</s>": 1})
    replace = [tokenizers.normalizers.Replace(pattern, "a" * length) for pattern in ("a", tokenizers.Regex("a+"))]
    tokenizer.normalizer = tokenizers.normalizers.Sequence(replace)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    if accepted:
        load_tokenizer(str(tmp_path))
        return
    with pytest.raises(DataError, match="its normalizer can make a text .* times as long; expected at most 100"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "own.model"])
def test_a_pipe_is_not_read_as_a_tokenizer(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="not a regular file"):
        load_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize("path", ["nowhere", "empty", "nul\0"])
def test_a_path_without_a_tokenizer_says_what_is_expected(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected"):
        load_tokenizer(str(tmp_path / path))


@needs_shared
def test_sentencepiece_ids_equal_those_of_its_library() -> None:
    path = SHARED / "spm" / "test_model.model"
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = (SHARED / "spm" / "botchan.txt").read_text().splitlines()[:50]
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encode_batch(texts) == [library.encode(text) for text in texts]
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (1000, library.eos_id())


@needs_shared
def test_gpt2_files_of_megatron_decode_exactly_the_text_that_they_encoded() -> None:
    folder = SHARED / "megatron_indexed"
    tokenizer = gpt2_tokenizer(folder / "gpt2-tiny-vocab.json", folder / "gpt2-tiny-merges.txt")
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (5000, 4999)
    text = "The quick brown fox;\n\tcafé"
    assert tokenizer.decode(tokenizer.encode(text)) == text
