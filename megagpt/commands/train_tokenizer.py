"""tools/train_tokenizer.py: a SentencePiece BPE tokenizer from text, which keeps every character as it is."""

import argparse
import io
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from megagpt.commands import shell
from megagpt.data.offline.documents import TEXT_KEY, InputFile, input_files
from megagpt.errors import ConfigError, MegagptError

EXAMPLE = """example:
  python tools/train_tokenizer.py --input corpus.jsonl --output data/tokenizer --vocab-size 32000
writes data/tokenizer.model, which goes into the config as data.tokenizer"""
MAX_LINE = 4000
"""Longest piece of text, characters, that SentencePiece is given at once."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="train_tokenizer", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files, globs or folders: .jsonl, .parquet or plain UTF-8 text, also as .gz or .zst",
    )
    parser.add_argument("--output", required=True, help="writes OUTPUT.model")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, with the 256 bytes and the end of document")
    parser.add_argument("--character-coverage", type=float, default=0.9995, help="share of characters with own pieces")
    parser.add_argument("--max-sentences", type=int, default=1_000_000, help="lines of text to learn from at most, sampled")
    return shell.run(_train, parser, argv)


def _train(args: argparse.Namespace) -> None:
    if args.vocab_size < 300:
        raise ConfigError(f"--vocab-size {args.vocab_size}: expected at least 300, for 256 bytes and some pieces")
    if args.max_sentences < 1:
        raise ConfigError(f"--max-sentences {args.max_sentences}: expected 1 or more")
    files = input_files(args.input)
    model = _train_bpe(Lines(files, args.max_sentences), args)
    output = Path(f"{args.output}.model")
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(output.name + ".tmp")
    aside.write_bytes(model)
    aside.replace(output)
    print(f"{output}: {args.vocab_size} pieces from {len(files)} files")


class Lines:
    """The text of `files` in pieces of at most `MAX_LINE` characters without blank ones: `limit` of them, drawn evenly.

    Drawn here, because SentencePiece's own sample differs from run to run (seen in 0.2.3, seeded or not).
    SentencePiece turns an exception of its input into a text with a Python traceback, so the error is kept here.
    """

    def __init__(self, files: Sequence[Path], limit: int) -> None:
        self._files, self._limit = files, limit
        self.error: MegagptError | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from _sample(self._all(), self._limit)
        except MegagptError as error:
            self.error = error

    def _all(self) -> Iterator[str]:
        for path in self._files:
            for (text,) in InputFile(path, [TEXT_KEY]):
                yield from _pieces(text.decode())


def _sample(items: Iterator[str], limit: int) -> list[str]:
    """`limit` of `items` (all, if there are fewer), each as likely as any: reservoir sampling (Vitter 1985, algorithm R)."""
    kept = list(itertools.islice(items, limit))
    generator = random.Random(0)
    for seen, item in enumerate(items, limit + 1):
        place = generator.randrange(seen)
        if place < limit:
            kept[place] = item
    return kept


def _pieces(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        for start in range(0, len(line), MAX_LINE):
            piece = line[start : start + MAX_LINE]
            if piece.strip():
                yield piece


def _train_bpe(lines: Lines, args: argparse.Namespace) -> bytes:
    """The model file's bytes, the same for the same text. Raises DataError for the text, ConfigError for the sizes."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=args.vocab_size,
            character_coverage=args.character_coverage,
            max_sentence_length=4 * MAX_LINE,
            byte_fallback=True,
            # The text comes back as it went in: nothing folded, added or trimmed. Runs of spaces may become pieces,
            # which code is full of; line ends and tabs are pieces of their own. One character is lost: U+2581, which
            # SentencePiece uses for the space.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        if lines.error is None:
            raise ConfigError(f"--vocab-size {args.vocab_size}: SentencePiece could not train on this text: {error}") from None
    if lines.error is not None:
        raise lines.error
    return model.getvalue()
