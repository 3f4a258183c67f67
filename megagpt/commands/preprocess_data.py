"""tools/preprocess_data.py: text files to token files in Megatron's format."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megagpt.commands import shell
from megagpt.commands.progress import progress
from megagpt.data.offline.documents import TEXT_KEY, input_files, stop
from megagpt.data.offline.preprocess import Counts, Job, preprocess
from megagpt.data.tokenizer import HuggingFaceTokenizer, Tokenizer, gpt2_tokenizer, load_tokenizer
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
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files, globs or folders: .jsonl, .parquet or plain UTF-8 text, also .gz, .zst",
    )
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX_KEY_document.bin and .idx")
    parser.add_argument(
        "--json-keys",
        "--jsonl-keys",
        nargs="+",
        default=[TEXT_KEY],
        help="keys of a JSON line, or columns of Parquet, to tokenize (default: text)",
    )
    parser.add_argument("--text-separator", help="plain text: what stands between documents (default: one file, one document)")
    parser.add_argument("--tokenizer", help="as data.tokenizer in a config: a .model, a tokenizer.json, a folder, or byte")
    parser.add_argument("--tokenizer-type", choices=TYPES, help="Megatron's flag, with the files below")
    parser.add_argument("--vocab-file", help="GPT2BPETokenizer: vocab.json; HFTokenizer: tokenizer.json")
    parser.add_argument("--merge-file", help="GPT2BPETokenizer: merges.txt (default: beside the vocab file)")
    parser.add_argument("--tokenizer-model", help="SentencePieceTokenizer: the .model; HFTokenizer: tokenizer.json")
    parser.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    parser.add_argument("--workers", type=int, default=cores(), help="cores to tokenize on (default: all, here %(default)s)")
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="a document that cannot be read ends the run (default), or is left out and counted",
    )
    parser.add_argument("--resume", action="store_true", help="go on after the last input file that a stopped run had finished")
    parser.add_argument(
        "--check-share",
        type=float,
        default=0.001,
        metavar="SHARE",
        help="share of documents, 0 to 1, that the reference library tokenizes again; a difference ends the run "
        "(default: %(default)s)",
    )
    parser.add_argument("--reference", action="store_true", help="tokenize with the reference library alone: exact and slow")
    parser.add_argument("--split-sentences", action="store_true", help=argparse.SUPPRESS)
    return shell.run(_preprocess, parser, argv)


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def _preprocess(args: argparse.Namespace) -> None:
    start = time.monotonic()
    _check(args)
    load = _tokenizer(args)
    tokenizer = load()
    before, after = _framing(args, tokenizer)
    files = input_files(args.input)
    job = Job(
        files=files,
        tokenizer=tokenizer,
        load=load,
        output_prefix=args.output_prefix,
        keys=args.json_keys,
        before=before,
        after=after,
        separator=args.text_separator,
        workers=args.workers,
        check_share=args.check_share,
        reference=args.reference,
        resume=args.resume,
    )
    with progress("tokenize", sum(path.stat().st_size for path in files)) as bar:
        counts = preprocess(job, bar, stop if args.on_error == "stop" else _warn)
    print(_summary(args.output_prefix, counts, time.monotonic() - start))


def _check(args: argparse.Namespace) -> None:
    if args.split_sentences:
        raise ConfigError("--split-sentences: serves BERT's sentence pairs; GPT reads documents whole, so leave it out")
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: expected 1 or more")
    if not 0 <= args.check_share <= 1:
        raise ConfigError(f"--check-share {args.check_share:g}: expected a share of the documents, 0 to 1")
    if args.text_separator == "":
        raise ConfigError("--text-separator: is empty; give the text that stands between documents, or leave it out")
    if len(set(args.json_keys)) < len(args.json_keys):
        raise ConfigError(f"--json-keys {' '.join(args.json_keys)}: names a key twice")


def _framing(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids around every document: with Megatron's HFTokenizer what the file's post-processor adds, then the end of document."""
    before: list[int] = []
    after: list[int] = []
    if args.tokenizer_type == "HFTokenizer" and isinstance(tokenizer, HuggingFaceTokenizer):
        before, after = tokenizer.framing()
    return before, [*after, tokenizer.eod_id] if args.append_eod else after


def _summary(prefix: str, counts: Counts, seconds: float) -> str:
    notes = [
        (counts.dropped, "empty ones dropped"),
        (counts.skipped, "unreadable ones skipped"),
        (counts.checked, "compared with the reference library"),
        (counts.resumed_files, "input files done before"),
    ]
    megabytes = counts.text_bytes / 1e6
    return (
        f"{prefix}: {counts.documents} documents{''.join(f', {count} {what}' for count, what in notes if count)}, "
        f"{counts.tokens} tokens from {megabytes:.1f} MB in {seconds:.1f} s ({megabytes / max(seconds, 1e-9):.1f} MB/s)"
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
