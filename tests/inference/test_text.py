"""Pieces of text join to the text of all tokens; half characters and parts of stop strings are never shown."""

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megagpt.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer
from megagpt.inference.text import TextStream

TEXT = "The café of 東京 has \U0001f600 and  two spaces.\nA new line."


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece model, which drops the space before the first word of what it decodes."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("\n".join(f"the word number {n} of a café in 東京 is new" for n in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "t"), vocab_size=300, byte_fallback=True, minloglevel=2
    )
    return SentencePieceTokenizer(Path(folder / "t.model"))


def shown(tokenizer: Tokenizer, prompt: str, text: str, stop: tuple[str, ...] = ()) -> list[str]:
    """Return the pieces that are shown while the tokens of `text` come after those of `prompt`."""
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    stream = TextStream(tokenizer, prompt_ids, stop)
    out = []
    for token in ids[len(prompt_ids) :]:
        out.append(stream.add(token))
        if stream.stopped:
            break
    return [*out, stream.finish()]


def test_bytes_become_complete_characters() -> None:
    parts = shown(ByteTokenizer(), "caf", TEXT)
    assert "".join(parts) == TEXT
    assert all("\N{REPLACEMENT CHARACTER}" not in part for part in parts)
    assert len([part for part in parts if part]) == len(TEXT)


def test_spaces_between_words_are_kept(pieces: Tokenizer) -> None:
    parts = shown(pieces, "the word", " number 7 of a café in 東京 is \U0001f600 new")
    assert "".join(parts) == " number 7 of a café in 東京 is \U0001f600 new"
    assert len([part for part in parts if part]) > 5


def test_bytes_that_are_no_character_are_shown_in_the_end() -> None:
    stream = TextStream(ByteTokenizer(), [65])
    assert stream.add(0xE6) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    endless = TextStream(ByteTokenizer(), [65])
    assert "".join(endless.add(0x80) for _ in range(20))  # invalid bytes do not hold the text back for ever


@pytest.mark.parametrize("text, stop, expected", [
    ("one two END three", ("END",), "one two "),
    ("one two END three", ("three", "END"), "one two "),
    ("ENENEND x", ("END",), "ENEN"),
    ("one EN two", ("END",), "one EN two"),
    ("ends with EN", ("END",), "ends with EN"),
    ("a\n\nb", ("\n\n",), "a"),
    ("東京 is 大阪", ("大",), "東京 is "),
    ("x", ("x",), ""),
])  # fmt: skip
def test_the_text_ends_before_the_first_stop_string(text: str, stop: tuple[str, ...], expected: str) -> None:
    parts = shown(ByteTokenizer(), "p", text, stop)
    assert "".join(parts) == expected
    for end in range(len(parts)):  # what is shown is never taken back
        assert expected.startswith("".join(parts[:end]))


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_any_text_and_any_stop_strings(text: str, stop: list[str]) -> None:
    positions = [position for one in stop if (position := text.find(one)) >= 0]
    # The first stop string to be complete ends the text.
    ends = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
    parts = shown(ByteTokenizer(), "p", text, tuple(stop))
    if not ends:
        assert "".join(parts) == text
    else:
        assert "".join(parts) in {text[:position] for position in positions}
        assert not any(one in "".join(parts) for one in stop)
