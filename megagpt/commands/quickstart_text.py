"""Text that a quickstart trains on, and prompts that suit it."""

import codecs
import random
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megagpt.errors import DataError

MIN_PROMPT = 8
MAX_PROMPT = 40
"""Characters of a prompt."""
UNSPACED_PROMPT = 6
"""Characters of a prompt from a text without spaces, such as Chinese."""
MIN_CHARACTERS = 200_000
MAX_CHARACTERS = 8_000_000
MIN_DOCUMENTS = 200
"""Fewer documents are divided into smaller ones, so that the split by documents leaves enough of them to evaluate on."""
TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})
GENERATED_FOLDERS = frozenset({"encodings", "pydoc_data"})
"""Folders of the standard library with generated files: megabytes of numbers and help texts instead of code."""


def choose_prompts(documents: Sequence[str]) -> tuple[str, str]:
    """Return two prompts that suit the text: the two most frequent beginnings of its lines.

    A beginning is the first two words, or the first few characters of a line without spaces.
    """
    beginnings = Counter(
        beginning for document in documents for line in document.splitlines() if (beginning := _beginning(line.strip()))
    )
    first, *others = [beginning for beginning, _ in beginnings.most_common(2)] or [documents[0].strip()[:UNSPACED_PROMPT]]
    return first, others[0] if others else first


def _beginning(line: str) -> str:
    """Return the start of a line as a prompt; an empty string if it is too short or has no words."""
    words = line.split(maxsplit=2)
    if len(words) == 3 and MIN_PROMPT <= len(prompt := " ".join(words[:2])) <= MAX_PROMPT:
        return prompt if sum(map(str.isalpha, prompt)) >= MIN_PROMPT // 2 else ""
    unspaced = len(words) > 0 and len(words[0]) > MAX_PROMPT
    return line[:UNSPACED_PROMPT] if unspaced and line[:UNSPACED_PROMPT].isalpha() else ""


def read_documents(text: Path | None) -> list[str]:
    """Return the documents to train on, at most MAX_CHARACTERS in total, in a fixed random order.

    The order matters because data.split takes the first documents for training and later ones for evaluation.
    Raises DataError if the text is missing or too short.
    """
    if text is None:
        documents = list(read_folder(_standard_library(), "*.py", skipped=TEST_FOLDERS | GENERATED_FOLDERS))
    elif text.is_dir():
        documents = list(read_folder(text, "*", skipped=frozenset({"__pycache__", ".git"})))
    elif text.is_file():
        documents = [read_text(text)]
    else:
        raise DataError(f"TEXT={text}: no such file or folder")
    n_characters = sum(map(len, documents))
    if n_characters < MIN_CHARACTERS:
        raise DataError(
            f"{text or _standard_library()}: {n_characters:,} characters of UTF-8 text; at least {MIN_CHARACTERS:,} are needed"
        )
    if len(documents) < MIN_DOCUMENTS:
        length = n_characters // MIN_DOCUMENTS
        documents = [piece for document in documents for piece in divide(document, length)]
    random.Random(0).shuffle(documents)
    return documents


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def read_folder(folder: Path, pattern: str, skipped: frozenset[str]) -> Iterator[str]:
    """Yield the texts of the files that match, in a fixed random order, at most MAX_CHARACTERS in total.

    Files below a folder named in `skipped`, and files that are not text, are skipped.
    """
    paths = sorted(path for path in folder.rglob(pattern) if not skipped & set(path.relative_to(folder).parts))
    random.Random(0).shuffle(paths)
    n_characters = 0
    for path in paths:
        text = read_text(path) if path.is_file() else ""
        n_characters += len(text)
        if n_characters > MAX_CHARACTERS:
            return
        if text:
            yield text


def read_text(path: Path) -> str:
    """Return the first MAX_CHARACTERS bytes of a file as text; an empty string if it is not UTF-8 or cannot be read."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CHARACTERS)
        text = codecs.getincrementaldecoder("utf-8")().decode(raw)  # incremental: the last character may be incomplete
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if "\0" in text else text


def divide(text: str, length: int) -> Iterator[str]:
    """Yield the text in pieces of complete lines; all but the last have at least `length` characters."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + length) + 1 or len(text)
        yield text[start:end]
        start = end
