"""Merged corpora equal, byte for byte, a corpus of all documents; pairs that cannot be merged are an error."""

import filecmp
import resource
import struct
import tempfile
import tracemalloc
from collections import namedtuple
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.indexed import IndexedCorpus, IndexedWriter
from megagpt.data.offline import document_blocks, merge
from megagpt.data.offline.merge import Pair, find_pairs
from megagpt.errors import DataError
from megagpt.progress import NoProgress

MEGATRON = Path(__file__).parents[4] / "shared/data/megatron_indexed/meg-gpt2-openwebtext_text_document"
Documents = Sequence[Sequence[Sequence[int]]]


def write(prefix: Path, documents: Documents, dtype: type = np.uint16) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(*document)
    return prefix


def packed_by_hand(documents: Documents) -> tuple[bytes, bytes]:
    """Return the pair of `documents` as the format defines it, with tokens as uint16."""
    sequences = [sequence for document in documents for sequence in document]
    sizes = [len(sequence) for sequence in sequences]
    offsets = [2 * sum(sizes[:n]) for n in range(len(sizes))]
    bounds = [sum(map(len, documents[:n])) for n in range(len(documents) + 1)]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(sizes), len(bounds))
    index += struct.pack(f"<{len(sizes)}i{len(sizes)}q", *sizes, *offsets) if sizes else b""
    index += struct.pack(f"<{len(bounds)}q", *bounds)
    return b"".join(struct.pack(f"<{len(sequence)}H", *sequence) for sequence in sequences), index


def contents(prefix: Path | str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def merged(prefixes: Sequence[Path], output: Path, overwrite: bool = False) -> tuple[bytes, bytes]:
    merge.merge([Pair.at(str(prefix)) for prefix in prefixes], str(output), NoProgress(), overwrite)
    return contents(output)


SEQUENCES = st.lists(st.integers(0, 65535), max_size=6)
DOCUMENTS = st.lists(SEQUENCES, max_size=3) | SEQUENCES.map(lambda tokens: [tokens])
ONE_TOKEN = [[[7]]]
"""The smallest corpus that can be written."""


@settings(max_examples=60, deadline=None)
@given(
    corpora=st.lists(st.lists(DOCUMENTS, max_size=6), min_size=1, max_size=4),
    block=st.integers(1, 40),
    window=st.integers(1, 4),
)
def test_any_merged_documents_give_the_bytes_packed_by_hand(corpora: list[Documents], block: int, window: int) -> None:
    corpora = [[*ONE_TOKEN, *corpus] for corpus in corpora]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(merge, "BLOCK_BYTES", 2 * block),
        mock.patch.object(document_blocks, "WINDOW_DOCUMENTS", window),
    ):
        prefixes = [write(Path(folder, str(number)), corpus) for number, corpus in enumerate(corpora)]
        documents = [document for corpus in corpora for document in corpus]
        assert merged(prefixes, Path(folder, "out")) == packed_by_hand(documents)


@pytest.mark.skipif(not MEGATRON.with_suffix(".idx").exists(), reason="../shared is absent")
def test_a_pair_of_megatron_that_is_divided_and_merged_is_the_same_again(tmp_path: Path) -> None:
    corpus = IndexedCorpus(MEGATRON)
    bounds = [0, 1, 400, 401, len(corpus.sizes)]
    slices = [write(tmp_path / f"{end:04}", [[corpus.read(i)] for i in range(start, end)]) for start, end in pairwise(bounds)]
    assert merged(slices, tmp_path / "merged") == contents(MEGATRON)


def test_memory_is_limited_to_a_block_of_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "BLOCK_BYTES", 1 << 16)
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_documents(np.zeros(40_000_000, np.uint16), [10_000] * 4000)
    source = Pair.at(str(tmp_path / "a"))
    tracemalloc.start()
    try:
        merge.merge([source], str(tmp_path / "out"), NoProgress())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert filecmp.cmp(tmp_path / "out.bin", tmp_path / "a.bin", shallow=False)
    assert peak < 25_000_000, "the tokens take 80 MB, the buffer of the writer takes 17 MB"


def test_there_may_be_more_pairs_than_open_files(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / f"{number:03}", [[[number]]]) for number in range(100)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 30, hard))
    try:
        pair = merged(prefixes, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert pair == packed_by_hand([[[number]] for number in range(100)])


def test_pairs_of_different_types_are_refused_with_the_names_of_both(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / "small", ONE_TOKEN), write(tmp_path / "large", ONE_TOKEN, np.int32)]
    with pytest.raises(DataError, match="large: its tokens are int32, but those of .*small are uint16; preprocess both"):
        merged(prefixes, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["a", "../{folder}/a", "link"])
def test_an_input_is_never_overwritten(name: str, tmp_path: Path) -> None:
    prefixes = [write(tmp_path / "b", ONE_TOKEN), write(tmp_path / "a", ONE_TOKEN)]
    before = contents(tmp_path / "a")
    (tmp_path / "link.bin").symlink_to(tmp_path / "a.bin")
    with pytest.raises(DataError, match="is one of the inputs, .*a; choose another name"):
        merged(prefixes, tmp_path / name.format(folder=tmp_path.name), overwrite=True)
    assert contents(tmp_path / "a") == before


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_an_existing_output_is_replaced_only_with_overwrite(suffix: str, tmp_path: Path) -> None:
    prefixes = [write(tmp_path / "a", ONE_TOKEN)]
    (tmp_path / f"out{suffix}").write_bytes(b"older")
    with pytest.raises(DataError, match=f"out{suffix}: already exists; .*--overwrite"):
        merged(prefixes, tmp_path / "out")
    assert (tmp_path / f"out{suffix}").read_bytes() == b"older"
    assert merged(prefixes, tmp_path / "out", overwrite=True) == packed_by_hand(ONE_TOKEN)


def test_a_disk_that_is_too_full_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    prefix = write(tmp_path / "a", [[[1] * 1000]] * 1000)  # 2 MB of tokens, 20 kB of index
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2_030_000))
    with pytest.raises(DataError, match=f"new/out: needs 2.0 MB, but {tmp_path} has 2.0 MB free"):
        merged([prefix], tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_inputs_may_be_prefixes_globs_and_folders_and_each_pair_comes_once_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder/below").mkdir(parents=True)
    # As files "a-b.idx" comes before "a.idx"; as prefixes "a" is the first.
    for name in ("a", "a-b", "v1.5", "folder/x", "folder/w", "folder/below/y"):
        write(Path(name), ONE_TOKEN)
    Path("folder/notes.txt").write_text("not a pair")
    assert find_pairs(["v1.5", "a.idx", "a-b.bin"]) == ["v1.5", "a", "a-b"]
    assert find_pairs(["a*.idx"]) == find_pairs(["a*"]) == ["a", "a-b"]
    assert find_pairs(["folder", "a"]) == ["folder/w", "folder/x", "a"]
    assert find_pairs(["a-b", "a*", "./a", str(tmp_path / "a.idx")]) == ["a-b", "a"]
    assert find_pairs(["folder/**/*.idx"]) == ["folder/below/y", "folder/w", "folder/x"]


def test_a_prefix_names_its_pair_also_if_a_folder_has_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    write(Path("a"), ONE_TOKEN)
    write(Path("a/x"), ONE_TOKEN)
    write(Path("shard[0]"), ONE_TOKEN)
    assert find_pairs(["a", "a/", "shard[0]"]) == ["a", "a/x", "shard[0]"]


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_a_file_without_its_partner_in_a_folder_is_not_ignored(missing: str, tmp_path: Path) -> None:
    write(tmp_path / "a", ONE_TOKEN)
    write(tmp_path / "b", ONE_TOKEN)
    (tmp_path / f"b{missing}").unlink()
    assert find_pairs([str(tmp_path)]) == [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.mark.parametrize("item", ["empty", "none*.idx"])
def test_a_folder_or_glob_without_a_pair_is_an_error(item: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(DataError, match="no pair of .bin and .idx files there"):
        find_pairs([item])
