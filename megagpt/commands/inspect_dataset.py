"""tools/inspect_dataset.py: what is in a pair of token files, and whether all of it is sound."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megagpt.commands import shell
from megagpt.commands.progress import progress
from megagpt.data.indexed import IndexedCorpus
from megagpt.data.offline.report import LARGEST_VOCABULARY, Inspection, document_start, inspect, sample_documents
from megagpt.data.tokenizer import Tokenizer, load_tokenizer
from megagpt.errors import ConfigError

EXAMPLE = """example:
  python tools/inspect_dataset.py data/corpus_text_document --tokenizer data/gpt2 --samples 3
Files are in bytes, lengths of documents in tokens; p95 is the length that 95 of 100 documents do not exceed. Sequences,
documents and positions are counted from 0. Exit code 2 and one sentence where the index is damaged, does not fit its
.bin, or a token id is outside the vocabulary."""
TOKENS_PER_CHARACTER = 4
"""At most, in bytes or pieces of them; so many tokens of a sample are decoded."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="inspect_dataset", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefix", metavar="PREFIX", help="reads PREFIX.bin and PREFIX.idx")
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument("--tokenizer", help="as data.tokenizer in a config: a .model, a tokenizer.json, a folder, or byte")
    vocabulary.add_argument("--vocab-size", type=int, metavar="N", help="without a tokenizer: ids must be below N")
    parser.add_argument("--top", type=int, default=10, metavar="K", help="list the K most frequent tokens (default: 10)")
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="show the text of the first document and N - 1 others (default: 0)"
    )
    parser.add_argument("--width", type=int, default=200, help="characters of each sample (default: 200)")
    parser.add_argument("--seed", type=int, default=1234, help="of the draw of samples (default: 1234)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    return shell.run(_inspect, parser, argv)


def _inspect(args: argparse.Namespace) -> None:
    _check(args)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    corpus = IndexedCorpus(args.prefix)
    vocab_size, eod_id = (tokenizer.vocab_size, tokenizer.eod_id) if tokenizer else (args.vocab_size, None)
    with progress("inspect", corpus.n_tokens * corpus.dtype.itemsize) as bar:
        found = inspect(corpus, vocab_size, eod_id, args.top, bar)
    report = asdict(found)
    if tokenizer:
        for token in report["most_frequent"]:
            token["piece"] = piece_of(tokenizer, token["id"])
        documents = sample_documents(corpus, args.samples, args.seed)
        report["samples"] = [_sample(corpus, document, tokenizer, args.width) for document in documents]
    print(json.dumps(report, indent=2) if args.json else _text(found, report))


def _check(args: argparse.Namespace) -> None:
    for flag, value, least in (("--top", args.top, 0), ("--samples", args.samples, 0), ("--width", args.width, 1)):
        if value < least:
            raise ConfigError(f"{flag} {value}: expected {least} or more")
    if args.samples and not args.tokenizer:
        raise ConfigError(f"--samples {args.samples}: needs the --tokenizer that turns tokens into text")
    if args.vocab_size is not None and not 1 <= args.vocab_size <= LARGEST_VOCABULARY:
        raise ConfigError(f"--vocab-size {args.vocab_size}: expected 1 to {LARGEST_VOCABULARY}")


def piece_of(tokenizer: Tokenizer, token: int) -> str:
    """The text that a token adds to what stands before it; empty for the end of document."""
    # Decoded after itself, because SentencePiece drops the space with which a text begins.
    return tokenizer.decode([token, token])[len(tokenizer.decode([token])) :]


def _sample(corpus: IndexedCorpus, document: int, tokenizer: Tokenizer, width: int) -> dict[str, Any]:
    first, end = corpus.document_indices[document : document + 2]
    n_tokens = int(corpus.sizes[first:end].sum(dtype="int64"))
    tokens = document_start(corpus, document, TOKENS_PER_CHARACTER * (width + 1))
    text = tokenizer.decode(tokens.tolist())
    cut = len(text) > width or len(tokens) < n_tokens
    return {"document": document, "tokens": n_tokens, "text": text[:width], "cut": cut}


def _text(found: Inspection, report: dict[str, Any]) -> str:
    """The report for people."""
    lengths, documents = found.tokens_per_document, found.documents
    rows = [
        ("files", f".bin {found.bin_bytes:,} bytes, .idx {found.idx_bytes:,} bytes"),
        ("type", found.dtype),
        ("sequences", f"{found.sequences:,}"),
        ("documents", f"{documents:,}, {found.empty_documents:,} of them empty"),
        ("tokens", f"{found.tokens:,}"),
        (
            "tokens per document",
            f"min {lengths.min:,}, median {lengths.median:,.1f}, mean {lengths.mean:,.1f}, p95 {lengths.p95:,.1f}, "
            f"max {lengths.max:,}",
        ),
        ("token ids", f"{found.smallest_id} to {found.largest_id}, {found.distinct_ids:,} distinct"),
    ]
    if found.documents_ending_in_eod is not None:
        ending = found.documents_ending_in_eod
        rows.append(("end of document", f"ends {ending:,} of {documents:,} documents ({ending / documents:.1%})"))
    lines = [found.prefix, *(f"  {name:<20} {value}" for name, value in rows)]
    if found.most_frequent:
        lines += ["", "most frequent tokens", f"  {'id':>10} {'count':>16} {'share':>7}{'  piece' * ('samples' in report)}"]
    for token in report["most_frequent"]:
        piece = "(end of document)" if token["id"] == found.eod_id else repr(token["piece"]) if "piece" in token else ""
        lines.append(f"  {token['id']:>10} {token['count']:>16,} {token['share']:>7.2%}  {piece}".rstrip())
    for sample in report.get("samples", []):
        text = repr(sample["text"]) + "..." * sample["cut"]
        lines += ["", f"document {sample['document']}, {sample['tokens']:,} tokens", f"  {text}"]
    return "\n".join(lines)
