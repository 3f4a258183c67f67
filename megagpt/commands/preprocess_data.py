"""tools/preprocess_data.py: text files to token files in Megatron's format."""

import argparse
import sys
from collections.abc import Sequence

from tqdm import tqdm

from megagpt.commands import shell
from megagpt.data.documents import TEXT_KEY, input_files
from megagpt.data.preprocess import preprocess
from megagpt.data.tokenizer import load_tokenizer
from megagpt.errors import ConfigError

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
    parser.add_argument("--merge-file", help="GPT2BPETokenizer: merges.txt, in the folder of the vocab file")
    parser.add_argument("--tokenizer-model", help="SentencePieceTokenizer: the .model; HFTokenizer: tokenizer.json")
    parser.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    parser.add_argument("--split-sentences", action="store_true", help=argparse.SUPPRESS)
    return shell.run(_preprocess, parser, argv)


def _preprocess(args: argparse.Namespace) -> None:
    if args.split_sentences:
        raise ConfigError("--split-sentences: serves BERT's sentence pairs; GPT reads documents whole, so leave it out")
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: expected 1 or more")
    tokenizer = _tokenizer(args)
    load_tokenizer(tokenizer)
    files = input_files(args.input)
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=not sys.stderr.isatty()) as bar:
        counts = preprocess(
            files, tokenizer, args.output_prefix, args.json_keys, args.append_eod, args.workers, args.text_separator, bar
        )
    dropped = f", {counts.dropped} empty ones dropped" if counts.dropped else ""
    rate = counts.text_bytes / max(counts.seconds, 1e-9) / 1e6
    print(
        f"{args.output_prefix}: {counts.documents} documents{dropped}, {counts.tokens} tokens from "
        f"{counts.text_bytes / 1e6:.1f} MB in {counts.seconds:.1f} s ({rate:.1f} MB/s)"
    )


def _tokenizer(args: argparse.Namespace) -> str:
    """The tokenizer's path from our flag or from Megatron's."""
    if (args.tokenizer is None) == (args.tokenizer_type is None):
        raise ConfigError("--tokenizer: give either --tokenizer PATH, or --tokenizer-type with its files")
    if args.tokenizer is not None:
        return args.tokenizer
    if args.tokenizer_type == "ByteTokenizer":
        return "byte"
    flags = {"GPT2BPETokenizer": ("vocab_file",), "SentencePieceTokenizer": ("tokenizer_model",)}
    for flag in flags.get(args.tokenizer_type, ("tokenizer_model", "vocab_file")):
        path = getattr(args, flag)
        if path:
            return str(path).rsplit("/", 1)[0] if args.tokenizer_type == "GPT2BPETokenizer" and "/" in path else path
    wanted = flags.get(args.tokenizer_type, ("tokenizer_model",))[0].replace("_", "-")
    raise ConfigError(f"--tokenizer-type {args.tokenizer_type}: needs --{wanted}")
