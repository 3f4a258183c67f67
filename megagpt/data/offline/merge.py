"""Several corpora into one, document after document."""

import glob
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data.indexed import IndexedCorpus, IndexedWriter, Position, Tokens, files_of
from megagpt.data.offline.document_blocks import DocumentBlock, TokenReader, document_blocks
from megagpt.errors import DataError

BLOCK_BYTES = 1 << 24
"""Tokens in memory at a time, in bytes; a longer document is held whole."""


@dataclass(frozen=True)
class Pair:
    """A pair that was checked. It is not kept open: there may be more of them than a process may open files."""

    prefix: str
    dtype: np.dtype[Any]
    bin_bytes: int
    idx_bytes: int

    @classmethod
    def at(cls, prefix: str) -> "Pair":
        """Raises DataError for what `IndexedCorpus` refuses."""
        dtype = IndexedCorpus(prefix).dtype
        tokens, index = files_of(prefix)
        return cls(prefix, dtype, tokens.stat().st_size, index.stat().st_size)


def find_pairs(inputs: Sequence[str]) -> list[str]:
    """Prefixes of the pairs that `inputs` name, each once, at its first place.

    An input is a prefix, with or without .idx, a glob of such, or a folder, which stands for all pairs in it, not below
    it; those of a glob or a folder are in sorted order. Raises DataError for one that names none.
    """
    found: dict[Path, str] = {}
    for item in inputs:
        for prefix in _prefixes(item):
            found.setdefault(files_of(prefix)[1].resolve(), prefix)
    return list(found.values())


def merge(pairs: Sequence[Pair], output_prefix: str, progress: Any, overwrite: bool = False) -> Position:
    """Write the documents of `pairs` in order, as preprocessing all their texts in one run would; returns the totals.

    `progress` has `update(bytes copied)`. Raises DataError where the types of tokens differ, the output is one of the
    inputs or exists and `overwrite` is not given, or the disk is too full; an older pair stays until the new one is whole.
    """
    _check_types(pairs)
    _check_output(pairs, output_prefix, overwrite)
    _check_room(pairs, output_prefix)
    with IndexedWriter(output_prefix, pairs[0].dtype) as writer:
        for pair in pairs:
            _append(writer, IndexedCorpus(pair.prefix), progress)
    return writer.position


def _append(writer: IndexedWriter, corpus: IndexedCorpus, progress: Any) -> None:
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
                "both texts with the same tokenizer, or train on both pairs by data.paths, where types may differ"
            )


def _check_output(pairs: Sequence[Pair], prefix: str, overwrite: bool) -> None:
    outputs = files_of(prefix)
    for pair in pairs:
        if {path.resolve() for path in files_of(pair.prefix)} & {path.resolve() for path in outputs}:
            raise DataError(f"--output-prefix {prefix}: is one of the inputs, {pair.prefix}; choose another name")
    existing = [path for path in outputs if path.exists()]
    if existing and not overwrite:
        raise DataError(f"{existing[0]}: exists already; choose another --output-prefix, or replace the pair with --overwrite")


def _check_room(pairs: Sequence[Pair], prefix: str) -> None:
    folder = next(parent for parent in Path(prefix).absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    # What goes into the .idx stands on the disk twice while it is written.
    needed = sum(pair.bin_bytes + 2 * pair.idx_bytes for pair in pairs)
    if free < needed:
        raise DataError(f"--output-prefix {prefix}: needs {needed / 1e6:.1f} MB, but {folder} has {free / 1e6:.1f} MB free")


def _prefixes(item: str) -> list[str]:
    prefix = _without_suffix(item)
    if any(path.is_file() for path in files_of(prefix)):
        return [prefix]
    if Path(item).is_dir():
        # Of a pair either file will do, so that one without its partner is missed by nobody.
        files = [str(path) for path in Path(item).iterdir() if path.suffix in (".bin", ".idx") and path.is_file()]
    elif glob.has_magic(item):
        files = glob.glob(f"{prefix}.idx", recursive=True)  # noqa: PTH207
    else:
        return [prefix]
    if not files:
        raise DataError(f"--input {item}: no pair of .bin and .idx there")
    return sorted({_without_suffix(file) for file in files})


def _without_suffix(name: str) -> str:
    return name.removesuffix(".idx").removesuffix(".bin")
