"""Batches of texts to arrays of token ids: by gigatoken where it gives the reference library's ids, else by that library.

gigatoken encodes a batch on all cores of one process, 20 to 100 times as fast as the reference libraries. It is a
second implementation of each tokenizer, so it is tried against the first one before it is used (`PROBES`), and
compared with it on a sample of the documents of every run (`SpotCheck`).
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megagpt.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megagpt.errors import DataError

LONGEST_CHECKED = 2**18
"""Bytes of the longest document that a sample compares: the reference libraries take a second for a megabyte."""


class Encoded(NamedTuple):
    """The tokens of a batch of documents, one document after another."""

    ids: npt.NDArray[Any]
    """[tokens], of any integer type"""
    sizes: npt.NDArray[np.int64]
    """Tokens of each document, [documents]; 0 for an empty one."""

    def document(self, number: int) -> list[int]:
        """The ids of one document."""
        end = int(self.sizes[: number + 1].sum())
        return self.ids[end - int(self.sizes[number]) : end].tolist()


class Encoder(Protocol):
    """Encodes batches of UTF-8 texts."""

    def __call__(self, texts: list[bytes]) -> Encoded:
        """No id is added to those of the texts."""


class ByteEncoder:
    """The ids of a `ByteTokenizer`: the bytes."""

    def __call__(self, texts: list[bytes]) -> Encoded:
        return Encoded(np.frombuffer(b"".join(texts), np.uint8), np.fromiter(map(len, texts), np.int64, len(texts)))


class ReferenceEncoder:
    """Any tokenizer, one core; `load` is called at the first batch, so that the encoder can be sent to a process."""

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
    """A tokenizer of gigatoken, which spreads a batch over its own threads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: list[bytes]) -> Encoded:
        layout = self._tokenizer.encode_batch(texts, parallel=True).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        return Encoded(np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets))


def fast_encoder(tokenizer: Tokenizer, threads: int) -> Encoder | None:
    """An encoder of many cores for `tokenizer`; None where there is none that gives the same ids for all `PROBES`."""
    if isinstance(tokenizer, ByteTokenizer):
        return ByteEncoder()
    encoder = _gigatoken(tokenizer, threads)
    if encoder is None:
        return None
    probes = [*PROBES, *(f"a{token} b{token}{token}\n" for token in tokenizer.special_tokens)]
    try:
        encoded = encoder([probe.encode() for probe in probes])
    except Exception:
        return None  # the package raises what it likes; a tokenizer that it fails on is one that it has not
    if [encoded.document(number) for number in range(len(probes))] != tokenizer.encode_batch(probes):
        return None
    return encoder


def _gigatoken(tokenizer: Tokenizer, threads: int) -> GigatokenEncoder | None:
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # read once, when its threads start
    try:
        import gigatoken

        if isinstance(tokenizer, HuggingFaceTokenizer):
            return GigatokenEncoder(gigatoken.Tokenizer.from_json(tokenizer.to_json()))
        if isinstance(tokenizer, SentencePieceTokenizer):
            return GigatokenEncoder(gigatoken.Tokenizer.from_json(_without_special(gigatoken, tokenizer.source)))
    except Exception:
        return None  # as above; among them ImportError, where it has no wheel
    return None


def _without_special(gigatoken: Any, model: Path) -> str:
    """gigatoken's tokenizer.json of a SentencePiece model, without <s> and its like: in a text they are text."""
    converted = json.loads(gigatoken.Tokenizer.from_sentencepiece(model)._hf_json)
    converted["added_tokens"] = [token for token in converted["added_tokens"] if not token["special"]]
    return json.dumps(converted)


class SpotCheck:
    """Compares a share of all documents with the reference library's ids."""

    def __init__(self, reference: Tokenizer, share: float) -> None:
        """`share` in 0 ... 1, of the documents; below 1, only of those up to `LONGEST_CHECKED` bytes."""
        self._reference, self._share = reference, share
        self._longest = LONGEST_CHECKED if share < 1 else None
        self._seen = 0
        self.checked = 0
        """Documents compared so far."""

    def __call__(self, texts: Sequence[bytes], encoded: Encoded) -> None:
        """Look at every 1 / share-th document, the first among them. Raises DataError that shows one that differs."""
        first, self._seen = self._seen, self._seen + len(texts)
        due = [n for n in range(len(texts)) if self._due(first + n)]
        chosen = [n for n in due if self._longest is None or len(texts[n]) <= self._longest]
        expected = self._reference.encode_batch([texts[n].decode() for n in chosen])
        for number, ids in zip(chosen, expected, strict=True):
            if encoded.document(number) != ids:
                raise DataError(_difference(first + number, texts[number].decode(), encoded.document(number), ids))
        self.checked += len(chosen)

    def _due(self, document: int) -> bool:
        return int(document * self._share) != int((document - 1) * self._share) if document else self._share > 0


def _difference(document: int, text: str, found: list[int], expected: list[int]) -> str:
    same = next((n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    return (
        f"document {document} (from 0): gigatoken and the reference library differ at its token {same}: "
        f"{found[same : same + 5]} against {expected[same : same + 5]}; run again with --reference, which is slow and "
        f"exact; the text: {shown!r}"
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
"""Texts on which implementations of tokenizers have been seen to differ: spaces, digits, contractions, long words."""
