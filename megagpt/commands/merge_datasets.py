"""tools/merge_datasets.py: merge pairs of token files into one pair, byte-identical to one preprocessing run on all texts."""

import argparse
import sys
import time
from collections.abc import Sequence

from megagpt.commands import shell
from megagpt.commands.progress import progress
from megagpt.data.offline.merge import Pair, find_pairs, merge

EXAMPLE = """example:
  python tools/merge_datasets.py --input data/part_*_text_document.idx --output-prefix data/corpus_text_document
It writes data/corpus_text_document.bin and .idx, whose prefix goes into a config's data section. The inputs are not changed.
The output needs as many bytes on disk as the inputs. A pair that is named twice is merged once. Speed is printed in MB/s, of
10^6 bytes."""


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("merge_datasets", __doc__, EXAMPLE)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="pairs in the order of the output: prefixes, globs of .idx files, or folders; the pairs of a glob or folder are "
        "sorted by name",
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output once the new pair is complete")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return shell.run(_merge, create_parser(), argv)


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


if __name__ == "__main__":
    sys.exit(main())
