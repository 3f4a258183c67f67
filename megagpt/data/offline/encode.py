"""Encode batches of texts: with gigatoken if it gives the same ids as the reference library, else with that library.

gigatoken encodes a batch on all cores of one process, about 10 times as fast as the reference libraries on 2 cores. It is a
second implementation of each tokenizer, so it is compared with the reference before it is used (`PROBES`), and again on a
sample of the documents of every run (`SpotCheck`).
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megagpt.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, library_errors
from megagpt.errors import DataError

MAX_CHECKED_BYTES = 2**18
"""Longest document that a spot check compares: the reference libraries need a second per megabyte."""


class Encoded(NamedTuple):
    """The token ids of a batch of documents, concatenated."""

    ids: npt.NDArray[Any]
    """[tokens], any integer type"""
    sizes: npt.NDArray[np.int64]
    """Tokens of each document, [documents]; 0 for an empty document."""

    def document(self, number: int) -> list[int]:
        """Return the ids of one document."""
        end = int(self.sizes[: number + 1].sum())
        return self.ids[end - int(self.sizes[number]) : end].tolist()


class Encoder(Protocol):
    """Encodes batches of UTF-8 texts."""

    def __call__(self, texts: list[bytes]) -> Encoded:
        """Return the ids of the texts, without added tokens."""


class ByteEncoder:
    """Encodes as `ByteTokenizer` does: bytes are ids."""

    def __call__(self, texts: list[bytes]) -> Encoded:
        return Encoded(np.frombuffer(b"".join(texts), np.uint8), np.fromiter(map(len, texts), np.int64, len(texts)))


class ReferenceEncoder:
    """Encodes with any tokenizer, on one core. `load` is called at the first batch, so the encoder can be sent to a process."""

    def __init__(self, load: Callable[[], Tokenizer]) -> None:
        self._load = load
        self._tokenizer: Tokenizer | None = None

    def __call__(self, texts: list[bytes]) -> Encoded:
        if self._tokenizer is None:
            self._tokenizer = self._load()
        documents = self._tokenizer.encode_batch([text.decode() for text in texts])
        sizes = np.fromiter(map(len, documents), np.int64, len(documents))
        ids = np.fromiter((token for tokens in documents for token in tokens), np.int64, int(sizes.sum()))
        return Encoded(ids, sizes)


class GigatokenEncoder:
    """Encodes with gigatoken, which uses its own threads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: list[bytes]) -> Encoded:
        with library_errors("gigatoken", "cannot encode these texts; run again with --reference, which is slow"):
            layout = self._tokenizer.encode_batch(texts, parallel=True).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        return Encoded(np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets))


def fast_encoder(tokenizer: Tokenizer, threads: int) -> Encoder | None:
    """Return a multi-core encoder for `tokenizer`, or None if none gives the same ids for all `PROBES`."""
    if isinstance(tokenizer, ByteTokenizer):
        return ByteEncoder()
    encoder = _gigatoken(tokenizer, threads)
    if encoder is None:
        return None
    probes = [*PROBES, *(f"a{token} b{token}{token}\n" for token in tokenizer.special_tokens)]
    try:
        encoded = encoder([probe.encode() for probe in probes])
    except DataError:
        return None  # gigatoken does not support this tokenizer
    if [encoded.document(number) for number in range(len(probes))] != tokenizer.encode_batch(probes):
        return None
    return encoder


def _gigatoken(tokenizer: Tokenizer, threads: int) -> GigatokenEncoder | None:
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # read once, when its threads start
    try:
        import gigatoken
    except ImportError:
        return None  # there is no wheel for this platform
    try:
        with library_errors("gigatoken", "cannot load this tokenizer"):
            if isinstance(tokenizer, HuggingFaceTokenizer):
                return GigatokenEncoder(gigatoken.Tokenizer.from_json(tokenizer.to_json()))
            if isinstance(tokenizer, SentencePieceTokenizer):
                return GigatokenEncoder(gigatoken.Tokenizer.from_json(_without_special(gigatoken, tokenizer.source)))
    except DataError:
        return None
    return None


def _without_special(gigatoken: Any, model: Path) -> str:
    """Return gigatoken's tokenizer.json of a SentencePiece model without special tokens: in a text, <s> is text."""
    converted = json.loads(gigatoken.Tokenizer.from_sentencepiece(model)._hf_json)
    converted["added_tokens"] = [token for token in converted["added_tokens"] if not token["special"]]
    return json.dumps(converted)


class SpotCheck:
    """Compares a share of all documents with the ids of the reference library."""

    def __init__(self, reference: Tokenizer, share: float) -> None:
        """`share`: share of documents, 0 to 1; below 1, only documents of at most `MAX_CHECKED_BYTES` are compared."""
        self._reference = reference
        self._share = share
        self._max_bytes = MAX_CHECKED_BYTES if share < 1 else None
        self._seen = 0
        self.checked = 0
        """Documents compared so far."""

    def __call__(self, texts: Sequence[bytes], encoded: Encoded) -> None:
        """Compare the first document and then every (1 / share)-th. Raises DataError with the first difference."""
        first = self._seen
        self._seen += len(texts)
        due = [n for n in range(len(texts)) if self._due(first + n)]
        chosen = [n for n in due if self._max_bytes is None or len(texts[n]) <= self._max_bytes]
        expected = self._reference.encode_batch([texts[n].decode() for n in chosen])
        for number, ids in zip(chosen, expected, strict=True):
            if encoded.document(number) != ids:
                raise DataError(_difference(first + number, texts[number].decode(), encoded.document(number), ids))
        self.checked += len(chosen)

    def _due(self, document: int) -> bool:
        return int(document * self._share) != int((document - 1) * self._share) if document else self._share > 0


def _difference(document: int, text: str, actual: list[int], expected: list[int]) -> str:
    shorter = min(len(actual), len(expected))
    position = next((n for n in range(shorter) if actual[n] != expected[n]), shorter)
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    return (
        f"document {document} (counted from 0): gigatoken and the reference library differ at token {position}: "
        f"{actual[position : position + 5]} instead of {expected[position : position + 5]}; run again with --reference, "
        f"which is slow and exact; the text: {shown!r}"
    )


PROBES = (
    "",
    "Hello world, it's we'll DON'T I'm you've they'd 'S 'tis 1234567890 3.14 ½ ² ٣",
    "  two\n\n\n    four \r\n\ttab\t\t end   ",
    " \n \u00a0\u3000\u2028\u2029\x0b\x0c\x1c\x85 spaces of all kinds \u200b\u200d\ufeff",
    "\x00\x01\x1f\x7f\x80\x9f control",
    "café cafe\u0301 ﬁ Ａｆｕｌｌ ΑΒΓ абв אבג العربية हिन्दी ไทย 日本語 中文，。 한국어",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U00010348 \U0010ffff \ue000 \ufffd",
    "a" * 500 + " " * 300 + "ab" * 200 + "-" * 257 + "=" * 33 + "\n" * 40 + "é" * 200,
    "def f(x):\n\treturn {'a': [x**2, x<<1]}  # comment\n\n\nclass A:\n    pass\n",
    "<|endoftext|> <s></s> <unk> [UNK] <0x41> ▁ ## Ġ Ċ",
    "https://example.org/a?b=c&d=%20#e user@example.org C++ U.S.A. $1,000.00 50% 10\u00b0C",
    "\U0001d400\U0001d7ce \u0130\u0131 \u1e9e\u00df \u01c5 \u03a3\u03c3\u03c2 \u0300\u0301\u0302 a\u0300\u0323",
)
"""Texts on which tokenizer implementations are known to differ: spaces, digits, contractions, long words."""
