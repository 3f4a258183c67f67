"""tools/preprocess_data.py: convert text, or examples for fine-tuning, to token files in Megatron's format."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megagpt.commands import shell
from megagpt.commands.progress import progress
from megagpt.data.chat_tokens import ParsingTokenizer, parsing_special_tokens
from megagpt.data.examples import mask_prefix
from megagpt.data.indexed import files_of
from megagpt.data.offline.documents import TEXT_KEY, select_input_files, stop, unescape_separator
from megagpt.data.offline.preprocess import Counts, PreprocessJob, preprocess
from megagpt.data.offline.preprocess_examples import (
    CONVERSATIONS,
    ChatEncoder,
    ExampleCounts,
    ExampleEncoder,
    ExamplesJob,
    PairEncoder,
    output_prefix,
    preprocess_examples,
)
from megagpt.data.tokenizer import HuggingFaceTokenizer, Tokenizer, gpt2_tokenizer, load_tokenizer
from megagpt.errors import ConfigError, DataError, listed

EXAMPLE = r"""examples:
  python tools/preprocess_data.py --input corpus.jsonl --tokenizer data/gpt2 --output-prefix data/corpus --append-eod
  python tools/preprocess_data.py --input novel.txt --text-separator '\n\n' --tokenizer byte --output-prefix data/novel
  python tools/preprocess_data.py --task chat --input chats.jsonl --tokenizer models/base --output-prefix data/chats
  python tools/preprocess_data.py --task pairs --input summaries.jsonl --tokenizer data/gpt2 --output-prefix data/pairs
The first writes data/corpus_text_document.bin and .idx. The prefix data/corpus_text_document goes into a config, as
data.train or data.paths. Training splits data by documents, so divide long text files with --text-separator. Speed is
printed in MB/s, of 10^6 bytes of text. The third writes data/chats_chat.bin, .idx and a mask, for
data.task "chat", and the last data/pairs_pairs.bin, for data.task "pairs"."""
FEW_DOCUMENTS = 20
"""Fewer documents than this may leave a share of data.split without any."""
MIN_BYTES_FOR_WORKERS = 2**21
"""Examples of fewer bytes are encoded in the command's own process."""
TYPES = ("GPT2BPETokenizer", "HFTokenizer", "SentencePieceTokenizer", "ByteTokenizer")


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("preprocess_data", __doc__, EXAMPLE)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, globs or folders: .jsonl, .parquet or plain UTF-8 text, also .gz and .zst; in a folder, hidden and "
        "binary files and descriptions of the dataset, such as README, are skipped",
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX_KEY_document.bin and .idx, or PREFIX_TASK.bin and .idx and its mask",
    )
    parser.add_argument(
        "--task",
        choices=("text", *CONVERSATIONS, "pairs"),
        default="text",
        help='text: documents for pretraining; chat: JSON lines with "messages", or "prompt" and "response"; '
        'preference: JSON lines with "prompt", "chosen" and "rejected"; pairs: JSON lines with "source" and "target", for a '
        "model with an encoder (default: %(default)s)",
    )
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="chat and preference: chatml, a file with a Jinja template, or the name of one of the tokenizer's templates "
        "(default: the tokenizer's)",
    )
    parser.add_argument(
        "--json-keys",
        "--jsonl-keys",
        nargs="+",
        default=[TEXT_KEY],
        metavar="KEY",
        help="keys of the JSON lines, or columns of Parquet, to tokenize; a.b names a nested key (default: text)",
    )
    parser.add_argument(
        "--text-separator",
        metavar="TEXT",
        help=r"text between two documents of a plain-text file, for example '\n\n' for a blank line (default: each file is "
        "one document)",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="like data.tokenizer in a config: a .model, a tokenizer.json, a folder, or byte"
    )
    parser.add_argument("--tokenizer-type", choices=TYPES, help="Megatron's flag instead of --tokenizer, with the files below")
    parser.add_argument("--vocab-file", metavar="FILE", help="GPT2BPETokenizer: vocab.json; HFTokenizer: tokenizer.json")
    parser.add_argument("--merge-file", metavar="FILE", help="GPT2BPETokenizer: merges.txt (default: beside the vocab file)")
    parser.add_argument(
        "--tokenizer-model", metavar="FILE", help="SentencePieceTokenizer: the .model; HFTokenizer: tokenizer.json"
    )
    parser.add_argument(
        "--parse-special-tokens",
        action="store_true",
        help="text: take the text of a special token, such as <|endoftext|>, for the token (default: it is text, except "
        "for the added tokens of a tokenizer.json)",
    )
    parser.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    parser.add_argument(
        "--workers", type=int, metavar="N", default=available_cores(), help="CPU cores to use (default: all, %(default)s here)"
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what to do with a document that cannot be read: end the run, or skip and count it (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="continue after the last input file that a stopped run finished")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output files once the new ones are complete")
    parser.add_argument(
        "--check-share",
        type=float,
        default=0.001,
        metavar="SHARE",
        help="share of documents, 0 to 1, to compare with the reference library; a difference ends the run "
        "(default: %(default)s)",
    )
    parser.add_argument("--reference", action="store_true", help="tokenize with the reference library only: exact and slow")
    parser.add_argument("--split-sentences", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return shell.run(_run, create_parser(), argv)


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _run(args: argparse.Namespace) -> None:
    if args.task == "text":
        _preprocess(args)
    else:
        _preprocess_examples(args)


def _preprocess_examples(args: argparse.Namespace) -> None:
    start = time.monotonic()
    _check_examples(args)
    load: Callable[[], ExampleEncoder] = partial(PairEncoder.load, args.tokenizer)
    if args.task in CONVERSATIONS:
        load = partial(ChatEncoder.load, args.task, args.tokenizer, args.chat_template)
    encoder = load()
    files = select_input_files(args.input).files
    # A process takes a second to start.
    workers = args.workers if sum(path.stat().st_size for path in files) > MIN_BYTES_FOR_WORKERS else 1
    job = ExamplesJob(files, load, args.task, args.output_prefix, workers)
    prefix = output_prefix(args.output_prefix, args.task)
    with progress("encode", sum(path.stat().st_size for path in files)) as bar:
        counts = preprocess_examples(job, bar, stop if args.on_error == "stop" else _warn)
    print(_examples_summary(prefix, counts, time.monotonic() - start))
    print(f'written: {prefix}.bin and .idx, and their mask; in a config: data.train = {prefix}, data.task = "{args.task}"')
    if isinstance(encoder, ChatEncoder) and (missing := encoder.template.text_tokens()):
        print(
            f"note: the tokenizer has no token {listed(missing)}, so the chat template writes them as text; a template with "
            "tokens of the tokenizer is shorter and safer"
        )


def _check_examples(args: argparse.Namespace) -> None:
    defaults = create_parser()
    for key in ("json_keys", "text_separator", "append_eod", "parse_special_tokens", "resume", "reference", "tokenizer_type"):
        if getattr(args, key) != defaults.get_default(key):
            raise ConfigError(f"--{key.replace('_', '-')}: is for --task text; leave it out with --task {args.task}")
    if args.tokenizer is None:
        wanted = "; name a tokenizer with a chat template, or set --chat-template" if args.task in CONVERSATIONS else ""
        raise ConfigError(f"--tokenizer: is needed{wanted}")
    if args.task not in CONVERSATIONS and args.chat_template is not None:
        raise ConfigError(f"--chat-template: is for --task chat and preference; leave it out with --task {args.task}")
    prefix = output_prefix(args.output_prefix, args.task)
    _require_absent([*files_of(prefix), *files_of(mask_prefix(prefix))], args.overwrite)


def _examples_summary(prefix: str, counts: ExampleCounts, seconds: float) -> str:
    skipped = f", {counts.skipped} skipped" if counts.skipped else ""
    return (
        f"{prefix}: {_number(counts.examples, 'example')}{skipped}, {counts.tokens} tokens, of which {counts.learned} are "
        f"learned; the longest has {counts.longest} tokens; {counts.examples / max(seconds, 1e-9):,.0f} examples/s"
    )


def _preprocess(args: argparse.Namespace) -> None:
    start = time.monotonic()
    _check(args)
    load = _tokenizer_loader(args)
    if args.parse_special_tokens:
        load = partial(_load_parsing, load)
    tokenizer = load()
    before, after = _added_tokens(args, tokenizer)
    selection = select_input_files(args.input)
    if selection.skipped:
        print(f"skipped {len(selection.skipped)} files that are not documents: {listed(map(str, selection.skipped))}")
    job = PreprocessJob(
        files=selection.files,
        tokenizer=tokenizer,
        load=load,
        output_prefix=args.output_prefix,
        keys=args.json_keys,
        before=before,
        after=after,
        separator=unescape_separator(args.text_separator) if args.text_separator is not None else None,
        workers=args.workers,
        check_share=args.check_share,
        reference=args.reference or isinstance(tokenizer, ParsingTokenizer),
        resume=args.resume,
    )
    with progress("tokenize", sum(path.stat().st_size for path in selection.files)) as bar:
        counts = preprocess(job, bar, stop if args.on_error == "stop" else _warn)
    print(_summary(args.output_prefix, counts, time.monotonic() - start))
    for prefix in _output_prefixes(args):
        print(f"written: {prefix}.bin and .idx; in a config: data.train or data.paths = {prefix}")
    for note in _notes(args, counts, len(selection.files)):
        print(f"note: {note}")


def _check(args: argparse.Namespace) -> None:
    if args.split_sentences:
        raise ConfigError("--split-sentences: is for BERT's sentence pairs; GPT reads entire documents, so leave it out")
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: expected 1 or more")
    if not 0 <= args.check_share <= 1:
        raise ConfigError(f"--check-share {args.check_share:g}: expected a share of the documents, 0 to 1")
    if len(set(args.json_keys)) < len(args.json_keys):
        raise ConfigError(f"--json-keys {' '.join(args.json_keys)}: names a key twice")
    if args.chat_template is not None:
        raise ConfigError("--chat-template: is for --task chat and preference; leave it out with --task text")
    _require_absent([path for prefix in _output_prefixes(args) for path in files_of(prefix)], args.overwrite or args.resume)


def _require_absent(paths: Sequence[Path], allowed: bool) -> None:
    existing = [path for path in paths if path.exists()]
    if existing and not allowed:
        raise ConfigError(
            f"{existing[0]}: already exists; choose another --output-prefix, or replace the files with --overwrite"
        )


def _output_prefixes(args: argparse.Namespace) -> list[str]:
    return [f"{args.output_prefix}_{key}_document" for key in args.json_keys]


def _added_tokens(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids to add before and after each document.

    They are those that the tokenizer's post-processor adds, with Megatron's HFTokenizer only, and the end-of-document token
    with --append-eod.
    """
    before: list[int] = []
    after: list[int] = []
    if args.tokenizer_type == "HFTokenizer" and isinstance(tokenizer, HuggingFaceTokenizer):
        before, after = tokenizer.framing()
    if args.append_eod:
        after = [*after, tokenizer.eod_id]
    return before, after


def _summary(prefix: str, counts: Counts, seconds: float) -> str:
    """Return one line with what was read and written, and the speed."""
    details = [
        (counts.dropped, "empty ones dropped"),
        (counts.skipped, "unreadable ones skipped"),
        (counts.checked, "compared with the reference library"),
        (counts.resumed_files, "input files done before"),
    ]
    megabytes = counts.text_bytes / 1e6
    return (
        f"{prefix}: {_number(counts.documents, 'document')}{''.join(f', {count} {what}' for count, what in details if count)}, "
        f"{counts.tokens} tokens from {megabytes:.1f} MB in {seconds:.1f} s ({megabytes / max(seconds, 1e-9):.1f} MB/s)"
    )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _notes(args: argparse.Namespace, counts: Counts, n_files: int) -> list[str]:
    """Return hints about results that are probably not intended."""
    notes = []
    one_document_per_file = counts.documents <= n_files * len(args.json_keys)
    if one_document_per_file and n_files < FEW_DOCUMENTS and args.text_separator is None:
        notes.append(
            f"only {_number(counts.documents, 'document')}: data.split divides by documents, so a "
            r"share may be empty; divide text files with --text-separator, for example '\n\n'"
        )
    if not args.append_eod:
        notes.append(
            "documents do not end with the end-of-document token; a model learns where documents end with --append-eod"
        )
    return notes


def _tokenizer_loader(args: argparse.Namespace) -> Callable[[], Tokenizer]:
    """Return a function that loads the tokenizer named by megagpt's flag or Megatron's flags. It must be picklable."""
    if (args.tokenizer is None) == (args.tokenizer_type is None):
        raise ConfigError("--tokenizer: set either --tokenizer PATH, or --tokenizer-type with its files")
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


def _load_parsing(load: Callable[[], Tokenizer]) -> Tokenizer:
    return parsing_special_tokens(load())


def _warn(error: DataError) -> None:
    print(f"skipped: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
