"""tools/train_tokenizer.py: a SentencePiece BPE tokenizer from text, which keeps every character as it is."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from megagpt.commands import shell
from megagpt.data.documents import TEXT_KEY, input_files, read_documents
from megagpt.errors import ConfigError

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
    parser.add_argument("--input", nargs="+", required=True, help="files, globs or folders: .jsonl, or plain UTF-8 text")
    parser.add_argument("--output", required=True, help="writes OUTPUT.model")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces, with the 256 bytes and the end of document")
    parser.add_argument("--character-coverage", type=float, default=0.9995, help="share of characters with own pieces")
    parser.add_argument("--max-sentences", type=int, default=1_000_000, help="lines of text to learn from at most, sampled")
    return shell.run(_train, parser, argv)


def _train(args: argparse.Namespace) -> None:
    if args.vocab_size < 300:
        raise ConfigError(f"--vocab-size {args.vocab_size}: expected at least 300, for 256 bytes and some pieces")
    files = input_files(args.input)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(files),
            model_prefix=args.output,
            model_type="bpe",
            vocab_size=args.vocab_size,
            character_coverage=args.character_coverage,
            input_sentence_size=args.max_sentences,
            max_sentence_length=4 * MAX_LINE,
            byte_fallback=True,
            # The text comes back as it went in: nothing folded, added or trimmed. Runs of spaces may become pieces,
            # which code is full of; line ends and tabs are pieces of their own.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"--vocab-size {args.vocab_size}: SentencePiece could not train on this text: {error}") from None
    Path(f"{args.output}.vocab").unlink(missing_ok=True)
    print(f"{args.output}.model: {args.vocab_size} pieces from {len(files)} files")


def _lines(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        for document in read_documents(path, [TEXT_KEY]):
            for line in document[TEXT_KEY].splitlines():
                if line.strip():
                    yield line[:MAX_LINE]
