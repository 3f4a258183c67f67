"""Tokenizers: text to token ids and back, by the library that each file format belongs to."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import sentencepiece
import tokenizers

from megagpt.errors import DataError

END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
"""Usual names of the token that ends a document, in order of preference, for files that do not declare it."""


class Tokenizer(Protocol):
    """A tokenizer, as megagpt uses it."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eod_id(self) -> int:
        """Id of the token that ends a document."""

    @property
    def special_tokens(self) -> list[str]:
        """Texts that become a single token wherever they occur."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without added special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without added special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""


class SentencePieceTokenizer:
    """A SentencePiece model file."""

    def __init__(self, path: Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: not a SentencePiece model: {error}") from None
        if self._model.eos_id() < 0:
            raise DataError(f"{path}: has no end-of-sentence piece, which is needed to end documents; train it with one")
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

    def __init__(self, tokenizer: tokenizers.Tokenizer, source: Path, eod_token: str | None = None) -> None:
        """`eod_token`: the token that ends documents, as the file's owner declares it; else one of the usual names.

        Raises DataError if there is no such token, or if the tokenizer encodes at random (BPE dropout).
        """
        if getattr(tokenizer.model, "dropout", None):
            raise DataError(f"{source}: BPE dropout {tokenizer.model.dropout:g} encodes at random; remove it from the file")
        # Files for fine-tuning often truncate and pad; a corpus needs entire documents.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.source = source
        self.special_tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        # Not the number of tokens: ids may have gaps.
        self.vocab_size: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        names = (eod_token,) if eod_token is not None else END_OF_DOCUMENT
        ids = [token for token in map(tokenizer.token_to_id, names) if token is not None]
        if not ids:
            raise DataError(f"{source}: has no token that ends documents; expected {' or '.join(names)}")
        self.eod_id: int = ids[0]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        text_ids = [int(token) for token in ids if token != self.eod_id]
        return self._tokenizer.decode(text_ids, skip_special_tokens=True)

    def to_json(self) -> str:
        """Return the content of a tokenizer.json."""
        return self._tokenizer.to_str()

    def framing(self) -> tuple[list[int], list[int]]:
        """Return the ids that the file's post-processor adds before and after a text, such as a BOS token."""
        plain, framed = (self._tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True))
        for start in range(len(framed) - len(plain) + 1):
            if framed[start : start + len(plain)] == plain:
                return framed[:start], framed[start + len(plain) :]
        raise DataError(
            f"{self.source}: its post-processor changes the tokens of the text itself; expected one that only adds tokens "
            "around them"
        )


class ByteTokenizer:
    """UTF-8 bytes as token ids, and 256 for the end of a document."""

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
    """Load a .model file, a tokenizer.json, a folder with tokenizer.json or with vocab.json and merges.txt, or "byte".

    Raises DataError for anything else.
    """
    if path == "byte":
        return ByteTokenizer()
    file = Path(path)
    if file.is_dir() and (file / "tokenizer.json").is_file():
        file = file / "tokenizer.json"
    if not file.exists():
        raise DataError(f"{file}: no such tokenizer; expected a .model, a tokenizer.json, a folder of GPT-2 files, or byte")
    if file.is_dir():
        return gpt2_tokenizer(file / "vocab.json", file / "merges.txt")
    if file.suffix == ".json":
        try:
            return HuggingFaceTokenizer(tokenizers.Tokenizer.from_file(str(file)), file, _declared_eos(file.parent))
        except DataError:
            raise
        except BaseException as error:  # the package raises bare Exception, and its Rust code panics with BaseException
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise DataError(f"{file}: not a tokenizer.json: {error}") from None
    return SentencePieceTokenizer(file)


def _declared_eos(folder: Path) -> str | None:
    """Return the end-of-sequence token that a tokenizer_config.json beside the tokenizer declares, or None."""
    try:
        declared = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(declared, dict):  # an AddedToken
        declared = declared.get("content")
    return declared if isinstance(declared, str) else None


def gpt2_tokenizer(vocab: Path, merges: Path) -> HuggingFaceTokenizer:
    """Load GPT-2's byte-level BPE (Radford et al. 2019) from its two files."""
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
    # <|endoftext|> is not a special token: as in Megatron's own GPT-2 tokenizer, one that occurs in a text is text and
    # cannot end the document.
    return HuggingFaceTokenizer(tokenizer, vocab)
