"""Merged corpora are, byte for byte, what writing all documents at once gives; what cannot be merged is told and left."""

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
from megagpt.data.offline.preprocess import Progress
from megagpt.errors import DataError

MEGATRON = Path(__file__).parents[3] / "shared/data/megatron_indexed/meg-gpt2-openwebtext_text_document"
Documents = Sequence[Sequence[Sequence[int]]]


def write(prefix: Path, documents: Documents, dtype: type = np.uint16) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(*document)
    return prefix


def by_hand(documents: Documents) -> tuple[bytes, bytes]:
    """The pair of `documents` as the format's description has it, tokens as uint16."""
    sequences = [sequence for document in documents for sequence in document]
    sizes = [len(sequence) for sequence in sequences]
    offsets = [2 * sum(sizes[:n]) for n in range(len(sizes))]
    bounds = [sum(map(len, documents[:n])) for n in range(len(documents) + 1)]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(sizes), len(bounds))
    index += struct.pack(f"<{len(sizes)}i{len(sizes)}q", *sizes, *offsets) if sizes else b""
    index += struct.pack(f"<{len(bounds)}q", *bounds)
    return b"".join(struct.pack(f"<{len(sequence)}H", *sequence) for sequence in sequences), index


def pair(prefix: Path | str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def merged(prefixes: Sequence[Path], output: Path, overwrite: bool = False) -> tuple[bytes, bytes]:
    merge.merge([Pair.at(str(prefix)) for prefix in prefixes], str(output), Progress(), overwrite)
    return pair(output)


sequence = st.lists(st.integers(0, 65535), max_size=6)
document = st.lists(sequence, max_size=3) | sequence.map(lambda tokens: [tokens])
has_token = [[[7]]]
"""A pair needs one."""


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.lists(document, max_size=6), min_size=1, max_size=4), block=st.integers(1, 40), window=st.integers(1, 4)
)
def test_any_documents_give_the_bytes_laid_out_by_hand(parts: list[Documents], block: int, window: int) -> None:
    parts = [[*has_token, *part] for part in parts]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(merge, "BLOCK_BYTES", 2 * block),
        mock.patch.object(document_blocks, "_WINDOW", window),
    ):
        prefixes = [write(Path(folder, str(number)), part) for number, part in enumerate(parts)]
        assert merged(prefixes, Path(folder, "out")) == by_hand([document for part in parts for document in part])


@pytest.mark.skipif(not MEGATRON.with_suffix(".idx").exists(), reason="../shared is absent")
def test_megatrons_own_pair_comes_back_from_its_pieces(tmp_path: Path) -> None:
    corpus = IndexedCorpus(MEGATRON)
    cuts = [0, 1, 400, 401, len(corpus.sizes)]
    pieces = [write(tmp_path / f"{end:04}", [[corpus.read(i)] for i in range(start, end)]) for start, end in pairwise(cuts)]
    assert merged(pieces, tmp_path / "whole") == pair(MEGATRON)


def test_memory_holds_a_block_and_not_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "BLOCK_BYTES", 1 << 16)
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_documents(np.zeros(40_000_000, np.uint16), [10_000] * 4000)
    source = Pair.at(str(tmp_path / "a"))
    tracemalloc.start()
    try:
        merge.merge([source], str(tmp_path / "out"), Progress())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert filecmp.cmp(tmp_path / "out.bin", tmp_path / "a.bin", shallow=False)
    assert peak < 25_000_000, "the tokens are 80 MB, the writer's own buffer 17"


def test_there_may_be_more_pairs_than_open_files(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / f"{number:03}", [[[number]]]) for number in range(100)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 30, hard))
    try:
        found = merged(prefixes, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == by_hand([[[number]] for number in range(100)])


def test_types_that_differ_are_refused_by_the_names_of_both(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / "small", has_token), write(tmp_path / "large", has_token, np.int32)]
    with pytest.raises(DataError, match="large: its tokens are int32, but those of .*small are uint16; preprocess both"):
        merged(prefixes, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["a", "../{folder}/a", "link"])
def test_an_input_is_not_overwritten(name: str, tmp_path: Path) -> None:
    prefixes = [write(tmp_path / "b", has_token), write(tmp_path / "a", has_token)]
    before = pair(tmp_path / "a")
    (tmp_path / "link.bin").symlink_to(tmp_path / "a.bin")
    with pytest.raises(DataError, match="is one of the inputs, .*a; choose another name"):
        merged(prefixes, tmp_path / name.format(folder=tmp_path.name), overwrite=True)
    assert pair(tmp_path / "a") == before


@pytest.mark.parametrize("left", [".bin", ".idx"])
def test_an_output_that_exists_is_replaced_only_on_demand(left: str, tmp_path: Path) -> None:
    prefixes = [write(tmp_path / "a", has_token)]
    (tmp_path / f"out{left}").write_bytes(b"older")
    with pytest.raises(DataError, match=f"out{left}: exists already; .*--overwrite"):
        merged(prefixes, tmp_path / "out")
    assert (tmp_path / f"out{left}").read_bytes() == b"older"
    assert merged(prefixes, tmp_path / "out", overwrite=True) == by_hand(has_token)


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    prefix = write(tmp_path / "a", [[[1] * 1000]] * 1000)  # 2 MB of tokens, 20 kB of index
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2_030_000))
    with pytest.raises(DataError, match=f"new/out: needs 2.0 MB, but {tmp_path} has 2.0 MB free"):
        merged([prefix], tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_inputs_are_prefixes_globs_and_folders_in_order_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder/below").mkdir(parents=True)
    # As files "a-b.idx" comes before "a.idx"; as prefixes "a" is the first.
    for name in ("a", "a-b", "v1.5", "folder/x", "folder/w", "folder/below/y"):
        write(Path(name), has_token)
    Path("folder/notes.txt").write_text("no pair")
    assert find_pairs(["v1.5", "a.idx", "a-b.bin"]) == ["v1.5", "a", "a-b"]
    assert find_pairs(["a*.idx"]) == find_pairs(["a*"]) == ["a", "a-b"]
    assert find_pairs(["folder", "a"]) == ["folder/w", "folder/x", "a"]
    assert find_pairs(["a-b", "a*", "./a", str(tmp_path / "a.idx")]) == ["a-b", "a"]
    assert find_pairs(["folder/**/*.idx"]) == ["folder/below/y", "folder/w", "folder/x"]


def test_a_pair_is_taken_for_itself_where_a_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    write(Path("a"), has_token)
    write(Path("a/x"), has_token)
    write(Path("part[0]"), has_token)
    assert find_pairs(["a", "a/", "part[0]"]) == ["a", "a/x", "part[0]"]


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_a_file_of_a_folder_without_its_partner_is_not_passed_over(missing: str, tmp_path: Path) -> None:
    write(tmp_path / "a", has_token)
    write(tmp_path / "b", has_token)
    (tmp_path / f"b{missing}").unlink()
    assert find_pairs([str(tmp_path)]) == [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.mark.parametrize("item", ["empty", "none*.idx"])
def test_a_folder_or_glob_without_a_pair_is_told(item: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(DataError, match="no pair of .bin and .idx there"):
        find_pairs([item])
