"""Tokenizers: text to token ids and back, by the library that each file format belongs to."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import sentencepiece
import tokenizers

from megagpt.errors import DataError, MegagptError
from megagpt.regular_file import read_regular_file, require_regular_file

END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
"""Usual names of the token that ends a document, in order of preference, for files that do not declare it."""
HUGGING_FACE, SENTENCEPIECE, VOCAB, MERGES = "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"
"""Names of tokenizer files in a folder, as Hugging Face uses them."""
DECLARATIONS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files beside a tokenizer that may declare its end-of-sequence token, in order of preference."""
COMPANIONS = ("added_tokens.json", "chat_template.jinja", "generation_config.json")
"""Files of a Hugging Face model that belong to its tokenizer, and that megagpt only copies."""
MAX_TOKENIZER_BYTES = 2**28
"""Largest accepted file of a tokenizer. The tokenizer.json of a vocabulary of 256,000 has 35 MB."""
LARGEST_VOCABULARY = 1 << 24
"""More ids than any tokenizer has; a larger one is a damaged file, and would need gigabytes for every count of ids."""
MAX_GROWTH = 100
"""Largest accepted factor by which replacements of a normalizer lengthen a text."""
_PROBE = f"Hello, it's 12 o'clock!\n\t{'a' * 500}! {'1' * 100}{' ' * 100}é 日本語 中文，한국어 العربية \U0001f600\x00\ufffd"
"""Characters of many kinds, and long runs, on which regular expressions that backtrack take exponential time."""
_HOW_TO_DECLARE = 'name it in a tokenizer_config.json beside the file: {"eos_token": "..."}'


class SpannedToken(NamedTuple):
    """A token and the characters of the text that it stands for."""

    id: int
    start: int
    end: int


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

    @property
    def control_tokens(self) -> dict[str, int]:
        """Text -> id of the tokens that divide documents and turns of a chat. Only a chat template may write them."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without added special tokens."""

    def encode_spans(self, text: str) -> list[SpannedToken]:
        """Return the tokens of `encode`, with the characters that each stands for."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without added special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""


class SentencePieceTokenizer:
    """A SentencePiece model file."""

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        """`eod_token`: the piece that ends documents, for a model that declares no end-of-sentence piece itself.

        Raises DataError if the file is no model, or if there is no such piece.
        """
        with library_errors(path, "not a SentencePiece model"):
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.source = path
        self.special_tokens: list[str] = []
        self.vocab_size: int = self._model.vocab_size()
        self.eod_id: int = self._model.eos_id()
        if self.eod_id < 0 and eod_token is not None:
            token = self._model.piece_to_id(eod_token)
            self.eod_id = token if self._model.id_to_piece(token) == eod_token else -1
        if self.eod_id < 0:
            wanted = "has no end-of-sentence piece" if eod_token is None else f"has no piece {eod_token}"
            raise DataError(f"{path}: {wanted}, which is needed to end documents; train it with one, or {_HOW_TO_DECLARE}")
        control = (token for token in range(self.vocab_size) if self._model.is_control(token) or token == self.eod_id)
        self.control_tokens: dict[str, int] = {self._model.id_to_piece(token): token for token in control}

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_spans(self, text: str) -> list[SpannedToken]:
        pieces = self._model.encode(text, out_type="proto").pieces
        return [SpannedToken(piece.id, piece.begin, piece.end) for piece in pieces]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(token) for token in ids if token != self.eod_id])


class HuggingFaceTokenizer:
    """A tokenizer.json of Hugging Face's tokenizers, or GPT-2's vocab.json and merges.txt."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, source: Path, eod_token: str | None = None) -> None:
        """`eod_token`: the token that ends documents, as the file's owner declares it; else one of the usual names.

        Raises DataError if there is no such token, if the tokenizer encodes at random (BPE dropout), and if it cannot encode
        every text: it lacks its token for unknown words, or a regular expression takes too long.
        """
        if getattr(tokenizer.model, "dropout", None):
            raise DataError(f"{source}: BPE dropout {tokenizer.model.dropout:g} encodes at random; remove it from the file")
        # Files for fine-tuning often truncate and pad; a corpus needs entire documents.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.source = source
        added = tokenizer.get_added_tokens_decoder()
        self.special_tokens = [token.content for token in added.values()]
        # Not the number of tokens: ids may have gaps.
        self.vocab_size: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.vocab_size > LARGEST_VOCABULARY:
            raise DataError(f"{source}: its largest token id is {self.vocab_size - 1}; expected below {LARGEST_VOCABULARY}")
        names = (eod_token,) if eod_token is not None else END_OF_DOCUMENT
        ids = [token for token in map(tokenizer.token_to_id, names) if token is not None]
        if not ids:
            raise DataError(
                f"{source}: has no token that ends documents; expected {' or '.join(names)}; to use another, {_HOW_TO_DECLARE}"
            )
        self.eod_id: int = ids[0]
        self.eod_token = str(tokenizer.id_to_token(self.eod_id))
        self.control_tokens: dict[str, int] = {token.content: number for number, token in added.items() if token.special}
        self.control_tokens[self.eod_token] = self.eod_id
        if (growth := _growth(tokenizer.normalizer)) > MAX_GROWTH:
            raise DataError(f"{source}: its normalizer can make a text {growth:g} times as long; expected at most {MAX_GROWTH}")
        with _without_native_messages(), library_errors(source, "cannot encode a text"):
            tokenizer.encode(_PROBE, add_special_tokens=False)  # at the start of a command, not in the middle of a corpus

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_spans(self, text: str) -> list[SpannedToken]:
        return encode_spans(self._tokenizer, text, self.source)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with library_errors(self.source, "cannot encode a text"):
            return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        text_ids = [int(token) for token in ids if token != self.eod_id]
        with library_errors(self.source, "cannot decode tokens"):
            return self._tokenizer.decode(text_ids, skip_special_tokens=True)

    def to_json(self) -> str:
        """Return the content of a tokenizer.json."""
        return self._tokenizer.to_str()

    def framing(self) -> tuple[list[int], list[int]]:
        """Return the ids that the file's post-processor adds before and after a text, such as a BOS token."""
        with library_errors(self.source, "cannot encode a text"):
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
    control_tokens: ClassVar[dict[str, int]] = {"<|endoftext|>": 256}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_spans(self, text: str) -> list[SpannedToken]:
        characters = enumerate(text)
        return [SpannedToken(byte, position, position + 1) for position, letter in characters for byte in letter.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(token) for token in ids if token < 256).decode(errors="replace")


def load_tokenizer(path: str) -> Tokenizer:
    """Load a .model file, a tokenizer.json, a folder with the files of a tokenizer, or "byte".

    Raises DataError for anything else.
    """
    if path == "byte":
        return ByteTokenizer()
    files = tokenizer_files(path)
    eod_token = _declared_eos(files)
    if HUGGING_FACE in files:
        file = files[HUGGING_FACE]
        with library_errors(file, "not a tokenizer.json"):
            return HuggingFaceTokenizer(tokenizers.Tokenizer.from_file(str(file)), file, eod_token)
    if VOCAB in files:
        return gpt2_tokenizer(files[VOCAB], files[MERGES], eod_token)
    return SentencePieceTokenizer(files[SENTENCEPIECE], eod_token)


def special_token_id(tokenizer: Tokenizer, text: str) -> int | None:
    """Return the id of a special token; None if the tokenizer has no such token."""
    found = tokenizer.control_tokens.get(text)
    if found is None and text in tokenizer.special_tokens and len(ids := tokenizer.encode(text)) == 1:
        return ids[0]
    return found


def tokenizer_files(path: str) -> dict[str, Path]:
    """Return the files that `load_tokenizer` reads for a path, by the names that they have in a folder; none for "byte".

    Raises DataError if there is no tokenizer, or if a file is no regular file of at most `MAX_TOKENIZER_BYTES`.
    """
    if path == "byte":
        return {}
    files = _main_files(Path(path))
    beside = next(iter(files.values())).parent
    files |= {name: beside / name for name in (*DECLARATIONS, *COMPANIONS) if (beside / name).is_file()}
    for file in files.values():
        try:
            require_regular_file(file, MAX_TOKENIZER_BYTES)
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: {getattr(error, 'strerror', None) or error}; expected a file of a tokenizer") from None
    return files


def _main_files(path: Path) -> dict[str, Path]:
    """Return the files that hold the vocabulary."""
    try:
        if not path.is_dir():
            if not path.exists():
                raise DataError(f"{path}: no such tokenizer; expected a .model, a tokenizer.json, a folder of one, or byte")
            return {HUGGING_FACE if path.suffix == ".json" else SENTENCEPIECE: path}
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}; expected a tokenizer") from None
    if (path / HUGGING_FACE).is_file():
        return {HUGGING_FACE: path / HUGGING_FACE}
    if (path / VOCAB).is_file():
        return {VOCAB: path / VOCAB, MERGES: path / MERGES}
    if (path / SENTENCEPIECE).is_file():
        return {SENTENCEPIECE: path / SENTENCEPIECE}
    raise DataError(f"{path}: no tokenizer here; expected {HUGGING_FACE}, {SENTENCEPIECE}, or {VOCAB} and {MERGES}")


def _declared_eos(files: Mapping[str, Path]) -> str | None:
    """Return the end-of-sequence token that a file beside the tokenizer declares, or None. Raises DataError for no JSON."""
    for name in DECLARATIONS:
        if name not in files:
            continue
        try:
            declared = json.loads(read_regular_file(files[name], MAX_TOKENIZER_BYTES)).get("eos_token")
        except (OSError, ValueError, AttributeError, RecursionError):
            raise DataError(f"{files[name]}: expected a JSON object, as Hugging Face writes it") from None
        if isinstance(declared, dict):  # an AddedToken
            declared = declared.get("content")
        if isinstance(declared, str):
            return declared
    return None


def gpt2_tokenizer(vocab: Path, merges: Path, eod_token: str | None = None) -> HuggingFaceTokenizer:
    """Load GPT-2's byte-level BPE (Radford et al. 2019) from its two files. `eod_token`: see `HuggingFaceTokenizer`."""
    for path in (vocab, merges):
        if not path.is_file():
            raise DataError(f"{path}: no such file; GPT-2's tokenizer is a vocab.json and a merges.txt")
    with library_errors(vocab, "not GPT-2's vocabulary and merges"):
        model = tokenizers.models.BPE.from_file(str(vocab), str(merges))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    # <|endoftext|> is not a special token: as in Megatron's own GPT-2 tokenizer, one that occurs in a text is text and
    # cannot end the document.
    return HuggingFaceTokenizer(tokenizer, vocab, eod_token)


def require_characters(text: str, where: str) -> None:
    """Raise DataError if a text has half of a surrogate pair, which JSON can express and no tokenizer encodes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: has half of a surrogate pair (\\ud800 ... \\udfff alone), which is not a character"
        ) from None


def encode_spans(tokenizer: tokenizers.Tokenizer, text: str, source: Path) -> list[SpannedToken]:
    """Return the tokens of a text with their characters. `source`: file of the tokenizer, for messages. Raises DataError."""
    with library_errors(source, "cannot encode a text"):
        encoding = tokenizer.encode(text, add_special_tokens=False)
    return [SpannedToken(token, *span) for token, span in zip(encoding.ids, encoding.offsets, strict=True)]


def _growth(normalizer: tokenizers.normalizers.Normalizer | None) -> float:
    """Return by which factor the replacements of a normalizer can lengthen a text, all together."""
    factor = 1.0
    pending = [] if normalizer is None else [json.loads(normalizer.__getstate__())]
    while pending:
        part = pending.pop()
        pending += part.get("normalizers", [])
        if part.get("type") == "Replace":
            pattern = part["pattern"].get("String", "")  # a regular expression may match a single character
            factor *= max(1.0, len(part["content"]) / max(1, len(pattern)))
    return factor


@contextmanager
def _without_native_messages() -> Iterator[None]:
    """Drop what native code prints to standard error: Rust reports a panic there, before it becomes an exception."""
    try:
        saved = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)


@contextmanager
def library_errors(source: Path | str, problem: str) -> Iterator[None]:
    """Turn any error of a tokenizer library into a DataError of one line: it raises bare Exception, and its Rust code panics
    with BaseException."""
    try:
        yield
    except (MegagptError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{source}: {problem}: {reason[:300]}") from None
