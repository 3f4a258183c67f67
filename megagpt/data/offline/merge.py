"""Merge several corpora into one, document by document."""

import glob
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data.indexed import IndexedCorpus, IndexedWriter, Tokens, WriterPosition, files_of
from megagpt.data.offline.document_blocks import DocumentBlock, TokenReader, document_blocks
from megagpt.errors import DataError
from megagpt.progress import Progress

BLOCK_BYTES = 1 << 24
"""Bytes of tokens in memory at a time; a longer document is read in full."""


@dataclass(frozen=True)
class Pair:
    """A valid pair. It is not kept open: there can be more pairs than a process may open files."""

    prefix: str
    dtype: np.dtype[Any]
    bin_bytes: int
    idx_bytes: int

    @classmethod
    def at(cls, prefix: str) -> "Pair":
        """Open and check the pair at `prefix`. Raises DataError as `IndexedCorpus` does."""
        dtype = IndexedCorpus(prefix).dtype
        tokens, index = files_of(prefix)
        return cls(prefix, dtype, tokens.stat().st_size, index.stat().st_size)


def find_pairs(inputs: Sequence[str]) -> list[str]:
    """Return the prefixes of the pairs that `inputs` name, each once, at its first position.

    An input is a prefix (with or without .idx), a glob, or a folder, which stands for the pairs directly in it. Pairs of a
    glob or a folder are sorted. Raises DataError if an input names no pair.
    """
    prefixes: dict[Path, str] = {}
    for item in inputs:
        for prefix in _prefixes(item):
            prefixes.setdefault(files_of(prefix)[1].resolve(), prefix)
    return list(prefixes.values())


def merge(pairs: Sequence[Pair], output_prefix: str, progress: Progress, overwrite: bool = False) -> WriterPosition:
    """Write the documents of `pairs` in order, as one preprocessing run over all texts would, and return the totals.

    Raises DataError if the token types differ, if the output is one of the inputs, if it exists and `overwrite` is false,
    or if the disk is too full. An existing pair stays until the new one is complete.
    """
    _check_types(pairs)
    _check_output(pairs, output_prefix, overwrite)
    _check_room(pairs, output_prefix)
    with IndexedWriter(output_prefix, pairs[0].dtype) as writer:
        for pair in pairs:
            _append(writer, IndexedCorpus(pair.prefix), progress)
    return writer.position


def _append(writer: IndexedWriter, corpus: IndexedCorpus, progress: Progress) -> None:
    with TokenReader(corpus) as reader:
        for block in document_blocks(corpus, BLOCK_BYTES // corpus.dtype.itemsize):
            tokens = reader.take(block.n_tokens)
            _add_block(writer, block, tokens)
            progress.update(tokens.nbytes)


def _add_block(writer: IndexedWriter, block: DocumentBlock, tokens: Tokens) -> None:
    if np.all(np.diff(block.bounds) == 1):
        writer.add_documents(tokens, block.sizes)
        return
    ends = np.concatenate([[0], np.cumsum(block.sizes, dtype=np.int64)])
    for first, end in pairwise(block.bounds):
        writer.add_document(*(tokens[start:stop] for start, stop in pairwise(ends[first : end + 1])))


def _check_types(pairs: Sequence[Pair]) -> None:
    first = pairs[0]
    for other in pairs[1:]:
        if other.dtype != first.dtype:
            raise DataError(
                f"{other.prefix}: its tokens are {other.dtype}, but those of {first.prefix} are {first.dtype}; preprocess "
                "both texts with the same tokenizer, or train on both pairs with data.paths, where types may differ"
            )


def _check_output(pairs: Sequence[Pair], prefix: str, overwrite: bool) -> None:
    outputs = files_of(prefix)
    for pair in pairs:
        if {path.resolve() for path in files_of(pair.prefix)} & {path.resolve() for path in outputs}:
            raise DataError(f"--output-prefix {prefix}: is one of the inputs, {pair.prefix}; choose another name")
    existing = [path for path in outputs if path.exists()]
    if existing and not overwrite:
        raise DataError(f"{existing[0]}: already exists; choose another --output-prefix, or replace the pair with --overwrite")


def _check_room(pairs: Sequence[Pair], prefix: str) -> None:
    folder = next(parent for parent in Path(prefix).absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    # The content of the .idx is on disk twice while it is written.
    needed = sum(pair.bin_bytes + 2 * pair.idx_bytes for pair in pairs)
    if free < needed:
        raise DataError(f"--output-prefix {prefix}: needs {needed / 1e6:.1f} MB, but {folder} has {free / 1e6:.1f} MB free")


def _prefixes(item: str) -> list[str]:
    prefix = _without_suffix(item)
    if any(path.is_file() for path in files_of(prefix)):
        return [prefix]
    if Path(item).is_dir():
        # Either file of a pair is enough here, so that a missing partner is reported and not ignored.
        files = [str(path) for path in Path(item).iterdir() if path.suffix in (".bin", ".idx") and path.is_file()]
    elif glob.has_magic(item):
        files = glob.glob(f"{prefix}.idx", recursive=True)  # noqa: PTH207
    else:
        return [prefix]
    if not files:
        raise DataError(f"--input {item}: no pair of .bin and .idx files there")
    return sorted({_without_suffix(file) for file in files})


def _without_suffix(name: str) -> str:
    return name.removesuffix(".idx").removesuffix(".bin")
