"""tools/train_tokenizer.py: train a SentencePiece BPE tokenizer whose decoded text is exactly the encoded text."""

import argparse
import io
import itertools
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from megagpt.commands import shell
from megagpt.data.offline.documents import TEXT_KEY, InputFile, input_files
from megagpt.errors import ConfigError

EXAMPLE = """example:
  python tools/train_tokenizer.py --input corpus.jsonl --output data/tokenizer --vocab-size 32000
It writes data/tokenizer.model, which goes into a config as data.tokenizer. The same text gives the same file."""
MIN_VOCAB_SIZE = 300
MAX_LINE = 4000
"""Longest piece of text that SentencePiece gets at once, in characters."""
RESERVED_PIECES = 256 + 3 + 2
"""Pieces that each vocabulary has: 256 bytes, 3 special tokens, line end and tab."""
MIN_COVERAGE = 0.98
"""SentencePiece accepts no lower character coverage."""
MAX_COVERAGE = 0.9995
"""Default share of the text whose characters get pieces of their own; the rest is encoded as bytes."""
CHARACTER_PIECES = 2 / 3
"""Largest share of the other pieces that single characters may take, so that there is room for longer pieces."""

GOOD_COVERAGE = 0.995
"""Coverage that `vocab_size_for` makes room for."""
VOCAB_STEP = 256
"""`vocab_size_for` returns multiples of this."""


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("train_tokenizer", __doc__, EXAMPLE)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, globs or folders: .jsonl, .parquet or plain UTF-8 text, also .gz and .zst",
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.model")
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        required=True,
        help=f"number of pieces, at least {MIN_VOCAB_SIZE}, including 256 bytes and the end-of-document token",
    )
    parser.add_argument(
        "--json-keys",
        "--jsonl-keys",
        nargs="+",
        default=[TEXT_KEY],
        metavar="KEY",
        help="keys of the JSON lines, or columns of Parquet, to learn from; a.b names a nested key (default: text)",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        metavar="SHARE",
        help=f"share of the text, {MIN_COVERAGE} to 1, whose characters get pieces of their own; others are encoded as bytes "
        f"(default: {MAX_COVERAGE}, or less if the text has too many different characters for the vocabulary)",
    )
    parser.add_argument(
        "--max-sentences",
        type=int,
        metavar="N",
        default=1_000_000,
        help="largest number of lines to learn from; of more lines a random sample is used (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing PREFIX.model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return shell.run(_train, create_parser(), argv)


def _train(args: argparse.Namespace) -> None:
    output = Path(f"{args.output}.model")
    _check(args, output)
    files = input_files(args.input)
    lines = _sample(_lines(files, args.json_keys), args.max_sentences)
    coverage = args.character_coverage
    if coverage is None:
        coverage = choose_coverage(lines, args.vocab_size)
        if coverage < MAX_COVERAGE:
            print(
                f"character coverage {coverage:.4f}: this text has too many different characters for {args.vocab_size} pieces; "
                "rarer characters are encoded as bytes"
            )
    model = train_bpe(lines, args.vocab_size, coverage)
    _write(output, model)
    print(f"{output}: {args.vocab_size} pieces from {len(files)} files; in a config: data.tokenizer = {output}")


def _check(args: argparse.Namespace, output: Path) -> None:
    if args.vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"--vocab-size {args.vocab_size}: expected at least {MIN_VOCAB_SIZE}, for 256 bytes and some longer pieces"
        )
    if args.max_sentences < 1:
        raise ConfigError(f"--max-sentences {args.max_sentences}: expected 1 or more")
    if args.character_coverage is not None and not MIN_COVERAGE <= args.character_coverage <= 1:
        raise ConfigError(
            f"--character-coverage {args.character_coverage:g}: expected a share of the text, {MIN_COVERAGE} to 1"
        )
    if output.exists() and not args.overwrite:
        raise ConfigError(f"{output}: already exists; choose another --output, or replace it with --overwrite")


def _write(output: Path, model: bytes) -> None:
    """Write the file atomically: to a temporary file, then renamed."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(output.name + ".tmp")
        temporary.write_bytes(model)
        temporary.replace(output)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {error.strerror}") from None


def _lines(files: Sequence[Path], keys: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the files, without blank ones; lines longer than `MAX_LINE` characters in pieces."""
    for path in files:
        for texts in InputFile(path, keys):
            for text in texts:
                yield from _pieces(text.decode())


def _sample(items: Iterator[str], limit: int) -> list[str]:
    """Return a uniform random sample of `limit` items (reservoir sampling, Vitter 1985, algorithm R), or all items.

    It replaces SentencePiece's own sample, which differs from run to run (seen in 0.2.3, with and without a seed).
    """
    sample = list(itertools.islice(items, limit))
    generator = random.Random(0)
    for seen, item in enumerate(items, limit + 1):
        index = generator.randrange(seen)
        if index < limit:
            sample[index] = item
    return sample


def _pieces(text: str) -> Iterator[str]:
    """Yield the non-blank lines of a text, in pieces of at most `MAX_LINE` characters."""
    for line in text.split("\n"):
        for start in range(0, len(line), MAX_LINE):
            piece = line[start : start + MAX_LINE]
            if piece.strip():
                yield piece


def vocab_size_for(texts: Iterable[str], minimum: int) -> int:
    """Return a vocabulary size, at least `minimum`, that has room for the characters of the texts and for longer pieces.

    The characters are those that cover `GOOD_COVERAGE` of the texts.
    """
    characters = n_characters(Counter(itertools.chain.from_iterable(texts)), GOOD_COVERAGE)
    needed = RESERVED_PIECES + math.ceil(characters / CHARACTER_PIECES)
    return max(minimum, math.ceil(needed / VOCAB_STEP) * VOCAB_STEP)


def n_characters(counts: Counter[str], coverage: float) -> int:
    """Return how many of the most frequent characters make up the share `coverage` of a text."""
    missing = coverage * sum(counts.values())
    for number, (_, count) in enumerate(counts.most_common()):
        if missing <= 0:
            return number
        missing -= count
    return len(counts)


def choose_coverage(lines: Sequence[str], vocab_size: int) -> float:
    """Return the largest character coverage that leaves room for pieces of several characters, from MIN to MAX_COVERAGE."""
    counts = Counter(itertools.chain.from_iterable(lines))
    total = sum(counts.values())
    room = max(1, int((vocab_size - RESERVED_PIECES) * CHARACTER_PIECES))
    if total == 0 or len(counts) <= room:
        return MAX_COVERAGE
    covered = sum(count for _, count in counts.most_common(room))
    return min(MAX_COVERAGE, max(MIN_COVERAGE, covered / total))


def train_bpe(lines: Sequence[str], vocab_size: int, coverage: float) -> bytes:
    """Train a BPE model and return the bytes of its file. The same lines give the same bytes.

    Raises ConfigError, with a value that works, if the text is too small or has too many characters for `vocab_size`.
    """
    model = io.BytesIO()
    if not lines:
        raise ConfigError("--input: has no text to learn from")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=coverage,
            max_sentence_length=4 * MAX_LINE,
            byte_fallback=True,
            # Decoding gives back the text exactly: nothing is folded, added or trimmed. Runs of spaces, frequent in code,
            # may become pieces; line ends and tabs are pieces of their own. One character is lost: U+2581, which
            # SentencePiece uses for the space.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise ConfigError(_size_problem(str(error), lines, vocab_size, coverage)) from None
    return model.getvalue()


def _size_problem(error: str, lines: Sequence[str], vocab_size: int, coverage: float) -> str:
    """Return SentencePiece's error as one sentence, with a value that works if SentencePiece names one."""
    lower = ", or a lower --character-coverage" if coverage > MIN_COVERAGE else ""
    if match := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", error):
        counts = Counter(itertools.chain.from_iterable(lines))
        return (
            f"--vocab-size {vocab_size}: this text has too many different characters: {len(counts):,}, of which "
            f"{n_characters(counts, coverage):,} need pieces at --character-coverage {coverage:g}, besides {RESERVED_PIECES} "
            f"pieces for bytes and special tokens; use --vocab-size {match[2]} or more{lower}"
        )
    if match := re.search(r"Vocabulary size too high \((\d+)\)\. Please set it to a value <= (\d+)", error):
        return (
            f"--vocab-size {vocab_size}: this text has pieces for at most {match[2]}; use --vocab-size {match[2]} or more text"
        )
    return f"--vocab-size {vocab_size}: SentencePiece could not train on this text: {error}"


if __name__ == "__main__":
    sys.exit(main())
