"""tools/train_tokenizer.py trains tokenizers that lose no character, and refuses sizes that do not fit the text."""

import json
from pathlib import Path

import pytest

from megagpt.commands.train_tokenizer import main
from megagpt.data.tokenizer import load_tokenizer

SOURCE = Path(__file__).read_text()
MANY_CHARACTERS = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 400))
TEXTS = [
    "Hello world",
    "",
    "Grüße, 世界!\n\ttabs  and   spaces",
    "a" * 300,
    "日本語 \U0001f600 <|endoftext|>",
    "x = {'y': 1}\n",
    "  two\n\n\n    four \r\n",
]


def train(path: Path, *flags: str, vocab_size: int = 400) -> int:
    """Train on a file; write tok.model beside it."""
    return main(["--input", str(path), "--output", str(path.parent / "tok"), "--vocab-size", str(vocab_size), *flags])


def test_a_trained_tokenizer_decodes_exactly_the_text_that_it_encoded(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(SOURCE * 3)
    assert train(tmp_path / "code.py") == 0
    tokenizer = load_tokenizer(str(tmp_path / "tok.model"))
    assert tokenizer.vocab_size == 400
    for text in [*TEXTS, SOURCE * 3]:
        (ids,) = tokenizer.encode_batch([text])
        assert tokenizer.decode(ids) == text


def test_text_is_read_under_the_given_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"doc": {"body": line}}) + "\n" for line in SOURCE.splitlines()))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_text(SOURCE)
    assert train(tmp_path / "a.jsonl", "--json-keys", "doc.body") == 0
    assert train(tmp_path / "b" / "a.txt") == 0
    assert (tmp_path / "tok.model").read_bytes() == (tmp_path / "b" / "tok.model").read_bytes()


def test_an_existing_model_is_replaced_only_with_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(SOURCE)
    (tmp_path / "tok.model").write_text("old")
    assert train(tmp_path / "a.txt") == 2
    error = capsys.readouterr().err
    assert "tok.model: already exists; choose another --output, or replace it with --overwrite" in error
    assert (tmp_path / "tok.model").read_text() == "old"
    assert train(tmp_path / "a.txt", "--overwrite") == 0
    assert load_tokenizer(str(tmp_path / "tok.model")).vocab_size == 400


def test_a_text_with_too_many_characters_for_the_vocabulary_gets_a_lower_coverage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(SOURCE * 20 + MANY_CHARACTERS)
    assert train(tmp_path / "a.txt") == 0
    assert "too many different characters for 400 pieces; rarer characters are encoded as bytes" in capsys.readouterr().out
    tokenizer = load_tokenizer(str(tmp_path / "tok.model"))
    assert tokenizer.decode(tokenizer.encode(MANY_CHARACTERS)) == MANY_CHARACTERS
    assert len(tokenizer.encode("assert main")) < len("assert main")


def test_a_vocabulary_too_small_for_the_characters_is_refused_with_one_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(SOURCE + MANY_CHARACTERS)
    for flags in (["--overwrite"], ["--overwrite", "--character-coverage", "1"]):
        assert train(tmp_path / "a.txt", *flags) == 2
        error = capsys.readouterr().err
        n_different = len(set(SOURCE + MANY_CHARACTERS) - {"\n"})
        assert f"--vocab-size 400: this text has too many different characters: {n_different}, of which" in error
        assert error.count("\n") == 1
        needed = int(error.split("use --vocab-size ")[1].split()[0])
        assert train(tmp_path / "a.txt", *flags, vocab_size=needed) == 0


def test_a_vocabulary_too_large_for_the_text_is_refused_with_one_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(SOURCE)
    assert train(tmp_path / "a.txt", vocab_size=50_000) == 2
    error = capsys.readouterr().err
    largest = int(error.split("use --vocab-size ")[1].split()[0])
    assert f"--vocab-size 50000: this text has pieces for at most {largest}" in error and error.count("\n") == 1
    assert train(tmp_path / "a.txt", vocab_size=largest) == 0


@pytest.mark.parametrize(
    "text, flags, message",
    [
        ("", [], "--input: has no text to learn from"),
        (SOURCE, ["--vocab-size", "299"], "--vocab-size 299: expected at least 300"),
        (SOURCE, ["--max-sentences", "0"], "--max-sentences 0: expected 1 or more"),
        (SOURCE, ["--character-coverage", "0.5"], "--character-coverage 0.5: expected a share of the text, 0.98 to 1"),
        (SOURCE, ["--output", "a.txt/tok"], "--output a.txt/tok.model: cannot be written"),
    ],
)
def test_a_wrong_argument_is_reported_in_one_line(
    text: str,
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(text)
    assert train(Path("a.txt"), *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
