"""Text to token ids and back, by the library that each tokenizer file belongs to."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import sentencepiece
import tokenizers

from megagpt.errors import DataError

END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
"""Names under which tokenizers have the end of a document, in order of preference."""


class Tokenizer(Protocol):
    """What megagpt needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""

    @property
    def eod_id(self) -> int:
        """The id that ends a document."""

    @property
    def special_tokens(self) -> list[str]:
        """Texts that become one token each wherever they stand."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text; none is added."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text; none is added."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""


class SentencePieceTokenizer:
    """A SentencePiece model file."""

    def __init__(self, path: Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: not a SentencePiece model: {error}") from None
        if self._model.eos_id() < 0:
            raise DataError(f"{path}: has no end-of-sentence piece, which ends documents; train it with one")
        self.source = path
        self.special_tokens: list[str] = []
        self.vocab_size: int = self._model.vocab_size()
        self.eod_id: int = self._model.eos_id()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(token) for token in ids if token != self.eod_id])


class HuggingFaceTokenizer:
    """A tokenizer.json of Hugging Face's tokenizers, or GPT-2's vocab.json and merges.txt."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, source: Path) -> None:
        # Files made for fine-tuning often cut and pad what they encode; a corpus wants documents whole.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.source = source
        self.special_tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        # Not the number of tokens: ids may have gaps.
        self.vocab_size: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        ids = [tokenizer.token_to_id(name) for name in END_OF_DOCUMENT]
        found = [token for token in ids if token is not None]
        if not found:
            raise DataError(f"{source}: has no token that ends documents; expected one of {', '.join(END_OF_DOCUMENT)}")
        self.eod_id: int = found[0]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        texts = [int(token) for token in ids if token != self.eod_id]
        return self._tokenizer.decode(texts, skip_special_tokens=True)

    def to_json(self) -> str:
        """The tokenizer as a tokenizer.json."""
        return self._tokenizer.to_str()

    def framing(self) -> tuple[list[int], list[int]]:
        """Ids that the file's post-processor puts before and after a text, such as a beginning-of-sequence token."""
        plain, framed = (self._tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True))
        for start in range(len(framed) - len(plain) + 1):
            if framed[start : start + len(plain)] == plain:
                return framed[:start], framed[start + len(plain) :]
        raise DataError(f"{self.source}: its post-processor changes the text's own tokens; expected one that frames them")


class ByteTokenizer:
    """UTF-8 bytes, and 256 for the end of a document."""

    vocab_size = 257
    eod_id = 256
    special_tokens: ClassVar[list[str]] = []

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(token) for token in ids if token < 256).decode(errors="replace")


def load_tokenizer(path: str) -> Tokenizer:
    """A tokenizer by what `path` is: a .model, a tokenizer.json, a folder with vocab.json and merges.txt, or "byte".

    Raises DataError where it is none of these.
    """
    if path == "byte":
        return ByteTokenizer()
    place = Path(path)
    if place.is_dir() and (place / "tokenizer.json").is_file():
        place = place / "tokenizer.json"
    if not place.exists():
        raise DataError(f"{place}: no such tokenizer; expected a .model, a tokenizer.json, a folder of GPT-2 files, or byte")
    if place.is_dir():
        return gpt2_tokenizer(place / "vocab.json", place / "merges.txt")
    if place.suffix == ".json":
        try:
            return HuggingFaceTokenizer(tokenizers.Tokenizer.from_file(str(place)), place)
        except Exception as error:  # the package raises bare Exception
            if isinstance(error, DataError):
                raise
            raise DataError(f"{place}: not a tokenizer.json: {error}") from None
    return SentencePieceTokenizer(place)


def gpt2_tokenizer(vocab: Path, merges: Path) -> HuggingFaceTokenizer:
    """GPT-2's byte-level BPE (Radford et al. 2019) from its two files."""
    for path in (vocab, merges):
        if not path.is_file():
            raise DataError(f"{path}: no such file; GPT-2's tokenizer is a vocab.json and a merges.txt")
    try:
        model = tokenizers.models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:
        raise DataError(f"{vocab}: not GPT-2's vocabulary and merges: {error}") from None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    # <|endoftext|> is not made a special token: as in Megatron's own GPT-2 tokenizer, one that stands in a text is
    # text, and cannot end the document that it stands in.
    return HuggingFaceTokenizer(tokenizer, vocab)
