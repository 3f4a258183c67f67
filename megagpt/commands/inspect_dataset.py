"""tools/inspect_dataset.py: report on a pair of token files, and check the index and every token id."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megagpt.commands import shell
from megagpt.commands.progress import progress
from megagpt.data.indexed import IndexedCorpus
from megagpt.data.offline.report import CorpusReport, corpus_report, document_start, sample_documents
from megagpt.data.tokenizer import LARGEST_VOCABULARY, Tokenizer, load_tokenizer
from megagpt.errors import ConfigError

EXAMPLE = """example:
  python tools/inspect_dataset.py data/corpus_text_document --tokenizer data/gpt2 --samples 3
File sizes are in bytes, document lengths in tokens; p95 is the length that 95% of the documents do not exceed. Sequences,
documents and positions are counted from 0. If the index is damaged, does not fit its .bin, or a token id is outside the
vocabulary, the command prints one sentence and exits with code 2."""
TOKENS_PER_CHARACTER = 4
"""Tokens that are decoded for each character of a sample; more tokens than any text needs, in all usual tokenizers."""


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("inspect_dataset", __doc__, EXAMPLE)
    parser.add_argument("prefix", metavar="PREFIX", help="reads PREFIX.bin and PREFIX.idx")
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument(
        "--tokenizer", metavar="PATH", help="like data.tokenizer in a config: a .model, a tokenizer.json, a folder, or byte"
    )
    vocabulary.add_argument("--vocab-size", type=int, metavar="N", help="without a tokenizer: ids must be below N")
    parser.add_argument(
        "--top", type=int, default=10, metavar="K", help="list the K most frequent tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=0,
        metavar="N",
        help="show the text of the first document and of N - 1 others (default: %(default)s)",
    )
    parser.add_argument(
        "--width", type=int, default=200, metavar="N", help="characters shown of each sample (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="seed of the random samples (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return shell.run(_inspect, create_parser(), argv)


def _inspect(args: argparse.Namespace) -> None:
    _check(args)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    corpus = IndexedCorpus(args.prefix)
    vocab_size = tokenizer.vocab_size if tokenizer else args.vocab_size
    eod_id = tokenizer.eod_id if tokenizer else None
    with progress("inspect", corpus.n_tokens * corpus.dtype.itemsize) as bar:
        report = corpus_report(corpus, vocab_size, eod_id, args.top, bar)
    values = asdict(report)
    if tokenizer:
        for token in values["most_frequent"]:
            token["piece"] = piece_of(tokenizer, token["id"])
        documents = sample_documents(corpus, args.samples, args.seed)
        values["samples"] = [_sample(corpus, document, tokenizer, args.width) for document in documents]
    print(json.dumps(values, indent=2) if args.json else _text(report, values))


def _check(args: argparse.Namespace) -> None:
    for flag, value, minimum in (("--top", args.top, 0), ("--samples", args.samples, 0), ("--width", args.width, 1)):
        if value < minimum:
            raise ConfigError(f"{flag} {value}: expected {minimum} or more")
    if args.samples and not args.tokenizer:
        raise ConfigError(f"--samples {args.samples}: needs a --tokenizer to turn tokens into text")
    if args.vocab_size is not None and not 1 <= args.vocab_size <= LARGEST_VOCABULARY:
        raise ConfigError(f"--vocab-size {args.vocab_size}: expected 1 to {LARGEST_VOCABULARY}")


def piece_of(tokenizer: Tokenizer, token: int) -> str:
    """Return the text that a token adds after other text; an empty string for the end-of-document token."""
    # The token is decoded after itself, because SentencePiece drops a space at the start of a text.
    return tokenizer.decode([token, token])[len(tokenizer.decode([token])) :]


def _sample(corpus: IndexedCorpus, document: int, tokenizer: Tokenizer, width: int) -> dict[str, Any]:
    """Return the first `width` characters of a document, and its length in tokens."""
    first, end = corpus.document_indices[document : document + 2]
    n_tokens = int(corpus.sizes[first:end].sum(dtype="int64"))
    tokens = document_start(corpus, document, TOKENS_PER_CHARACTER * (width + 1))
    text = tokenizer.decode(tokens.tolist())
    cut = len(text) > width or len(tokens) < n_tokens
    return {"document": document, "tokens": n_tokens, "text": text[:width], "cut": cut}


def _text(report: CorpusReport, values: dict[str, Any]) -> str:
    """Format the report for people. `values` has the report's fields, and the texts of tokens and samples."""
    lengths = report.tokens_per_document
    documents = report.documents
    rows = [
        ("files", f".bin {report.bin_bytes:,} bytes, .idx {report.idx_bytes:,} bytes"),
        ("type", report.dtype),
        ("sequences", f"{report.sequences:,}"),
        ("documents", f"{documents:,}, {report.empty_documents:,} of them empty"),
        ("tokens", f"{report.tokens:,}"),
        (
            "tokens per document",
            f"min {lengths.min:,}, median {lengths.median:,.1f}, mean {lengths.mean:,.1f}, p95 {lengths.p95:,.1f}, "
            f"max {lengths.max:,}",
        ),
        ("token ids", f"{report.smallest_id} to {report.largest_id}, {report.distinct_ids:,} distinct"),
    ]
    if report.documents_ending_in_eod is not None:
        ending = report.documents_ending_in_eod
        rows.append(("end of document", f"ends {ending:,} of {documents:,} documents ({ending / documents:.1%})"))
    lines = [report.prefix, *(f"  {name:<20} {value}" for name, value in rows)]
    if report.most_frequent:
        lines += [
            "",
            "most frequent tokens",
            f"  {'id':>10} {'count':>16} {'share':>7}{'  piece' if 'samples' in values else ''}",
        ]
    for token in values["most_frequent"]:
        piece = _piece_column(token, report.eod_id)
        lines.append(f"  {token['id']:>10} {token['count']:>16,} {token['share']:>7.2%}  {piece}".rstrip())
    for sample in values.get("samples", []):
        text = repr(sample["text"]) + ("..." if sample["cut"] else "")
        lines += ["", f"document {sample['document']}, {sample['tokens']:,} tokens", f"  {text}"]
    return "\n".join(lines)


def _piece_column(token: dict[str, Any], eod_id: int | None) -> str:
    if token["id"] == eod_id:
        return "(end of document)"
    return repr(token["piece"]) if "piece" in token else ""


if __name__ == "__main__":
    sys.exit(main())
