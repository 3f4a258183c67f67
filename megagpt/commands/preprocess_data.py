"""tools/preprocess_data.py: text files to token files in Megatron's format."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megagpt.commands import shell
from megagpt.data.documents import TEXT_KEY, input_files, stop
from megagpt.data.preprocess import preprocess
from megagpt.data.tokenizer import Tokenizer, gpt2_tokenizer, load_tokenizer
from megagpt.errors import ConfigError, DataError

EXAMPLE = """example:
  python tools/preprocess_data.py --input corpus.jsonl --tokenizer data/gpt2 --output-prefix data/corpus --append-eod
writes data/corpus_text_document.bin and .idx, whose prefix goes into the config's data section"""
TYPES = ("GPT2BPETokenizer", "HFTokenizer", "SentencePieceTokenizer", "ByteTokenizer")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="preprocess_data", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, help="files, globs or folders: .jsonl, or plain UTF-8 text")
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX_KEY_document.bin and .idx")
    parser.add_argument("--json-keys", nargs="+", default=[TEXT_KEY], help="keys of a JSON line to tokenize (default: text)")
    parser.add_argument("--text-separator", help="plain text: what stands between documents (default: one file, one document)")
    parser.add_argument("--tokenizer", help="as data.tokenizer in a config: a .model, a tokenizer.json, a folder, or byte")
    parser.add_argument("--tokenizer-type", choices=TYPES, help="Megatron's flag, with the files below")
    parser.add_argument("--vocab-file", help="GPT2BPETokenizer: vocab.json; HFTokenizer: tokenizer.json")
    parser.add_argument("--merge-file", help="GPT2BPETokenizer: merges.txt (default: beside the vocab file)")
    parser.add_argument("--tokenizer-model", help="SentencePieceTokenizer: the .model; HFTokenizer: tokenizer.json")
    parser.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="a document that cannot be read ends the run, or is left out",
    )
    parser.add_argument("--split-sentences", action="store_true", help=argparse.SUPPRESS)
    return shell.run(_preprocess, parser, argv)


def _preprocess(args: argparse.Namespace) -> None:
    if args.split_sentences:
        raise ConfigError("--split-sentences: serves BERT's sentence pairs; GPT reads documents whole, so leave it out")
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: expected 1 or more")
    load = _tokenizer(args)
    load()
    files = input_files(args.input)
    total = sum(path.stat().st_size for path in files)
    with _progress(total) as progress:
        counts = preprocess(
            files,
            load,
            args.output_prefix,
            args.json_keys,
            args.append_eod,
            args.workers,
            args.text_separator,
            progress,
            stop if args.on_error == "stop" else _warn,
        )
    dropped = f", {counts.dropped} empty ones dropped" if counts.dropped else ""
    skipped = f", {counts.skipped} unreadable ones skipped" if counts.skipped else ""
    rate = counts.text_bytes / max(counts.seconds, 1e-9) / 1e6
    print(
        f"{args.output_prefix}: {counts.documents} documents{dropped}{skipped}, {counts.tokens} tokens from "
        f"{counts.text_bytes / 1e6:.1f} MB in {counts.seconds:.1f} s ({rate:.1f} MB/s)"
    )


def _tokenizer(args: argparse.Namespace) -> Callable[[], Tokenizer]:
    """What loads the tokenizer named by our flag or by Megatron's."""
    if (args.tokenizer is None) == (args.tokenizer_type is None):
        raise ConfigError("--tokenizer: give either --tokenizer PATH, or --tokenizer-type with its files")
    if args.tokenizer is not None:
        return partial(load_tokenizer, args.tokenizer)
    if args.tokenizer_type == "ByteTokenizer":
        return partial(load_tokenizer, "byte")
    if args.tokenizer_type == "GPT2BPETokenizer":
        if not args.vocab_file:
            raise ConfigError("--tokenizer-type GPT2BPETokenizer: needs --vocab-file and --merge-file")
        vocab = Path(args.vocab_file)
        return partial(gpt2_tokenizer, vocab, Path(args.merge_file) if args.merge_file else vocab.with_name("merges.txt"))
    model = args.tokenizer_model or (args.vocab_file if args.tokenizer_type == "HFTokenizer" else None)
    if not model:
        raise ConfigError(f"--tokenizer-type {args.tokenizer_type}: needs --tokenizer-model")
    return partial(load_tokenizer, model)


def _warn(error: DataError) -> None:
    print(f"skipped: {error}", file=sys.stderr)


def _progress(total: int) -> "tqdm[None] | LogLines":
    """A bar on a terminal, now and then a line in a log."""
    return tqdm(total=total, unit="B", unit_scale=True, desc="tokenize") if sys.stderr.isatty() else LogLines(total)


class LogLines:
    """Progress in a log: a whole line every `seconds`."""

    def __init__(self, total: int, seconds: float = 30.0) -> None:
        self._total, self._seconds, self._done = total, seconds, 0
        self._start = self._last = time.monotonic()

    def update(self, n_bytes: int) -> None:
        """`n_bytes` of text more are done."""
        self._done += n_bytes
        now = time.monotonic()
        if now - self._last < self._seconds:
            return
        self._last = now
        rate = self._done / (now - self._start) / 1e6
        print(f"tokenize: {self._done / 1e6:.0f} of {self._total / 1e6:.0f} MB, {rate:.1f} MB/s", file=sys.stderr, flush=True)

    def __enter__(self) -> "LogLines":
        return self

    def __exit__(self, *error: object) -> None:
        return None
