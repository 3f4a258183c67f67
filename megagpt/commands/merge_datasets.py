"""tools/merge_datasets.py: several pairs of token files into one, as if their texts had been preprocessed in one run."""

import argparse
import time
from collections.abc import Sequence

from megagpt.commands import shell
from megagpt.commands.progress import progress
from megagpt.data.offline.merge import Pair, find_pairs, merge

EXAMPLE = """example:
  python tools/merge_datasets.py --input data/part_*_text_document.idx --output-prefix data/corpus_text_document
writes data/corpus_text_document.bin and .idx, whose prefix goes into the config's data section. The inputs stay as they
are; the disk needs room for as many bytes again. A pair that is named twice is merged once."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="merge_datasets", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="pairs in the order of the result: prefixes, globs of .idx, or folders, whose pairs are taken in sorted order",
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists, once the new pair is whole")
    return shell.run(_merge, parser, argv)


def _merge(args: argparse.Namespace) -> None:
    start = time.monotonic()
    pairs = [Pair.at(prefix) for prefix in find_pairs(args.input)]
    n_bytes = sum(pair.bin_bytes for pair in pairs)
    with progress("merge", n_bytes) as bar:
        totals = merge(pairs, args.output_prefix, bar, args.overwrite)
    seconds = time.monotonic() - start
    print(
        f"{args.output_prefix}: {totals.documents} documents, {totals.tokens} tokens from {len(pairs)} "
        f"pair{'s' if len(pairs) > 1 else ''} in {seconds:.1f} s ({n_bytes / 1e6 / max(seconds, 1e-9):.1f} MB/s)"
    )
