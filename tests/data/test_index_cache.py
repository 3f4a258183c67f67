"""Stored shuffle orders equal those in memory, are built once by any number of processes, and never serve other data."""

import multiprocessing as mp
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagpt.data import index_cache
from megagpt.data.gpt_dataset import PackedCorpus
from megagpt.data.index_cache import IndexCache, content_fingerprint, corpus_fingerprint
from megagpt.data.indexed import IndexedCorpus, IndexedWriter
from megagpt.data.shuffle import EpochOrder, epoch_order
from megagpt.errors import DataError


def write(prefix: Path, seed: int = 0, sizes_seed: int = 9) -> IndexedCorpus:
    generator = np.random.default_rng(seed)
    sizes = np.random.default_rng(sizes_seed).integers(1, 40, 200)
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_documents(generator.integers(0, 1000, int(sizes.sum())).astype(np.uint16), sizes)
    return IndexedCorpus(prefix)


def samples(packed: PackedCorpus, count: int = 30) -> list[list[int]]:
    return [packed.sample(index).tokens.tolist() for index in range(count)]


def must_not_build() -> EpochOrder:
    raise AssertionError("the order was built again although it is stored")


@pytest.fixture
def store_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Store orders of every size."""
    monkeypatch.setattr(index_cache, "MIN_SIZE", 0)


def test_samples_of_a_stored_order_equal_those_of_an_order_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write(tmp_path / "c")
    in_memory = samples(PackedCorpus(corpus, range(10, 150), 16, 5), 300)  # several epochs
    monkeypatch.setattr(index_cache, "MIN_SIZE", 0)
    for _ in range(2):
        assert samples(PackedCorpus(corpus, range(10, 150), 16, 5), 300) == in_memory
    assert (tmp_path / "c.index").is_dir()


@pytest.mark.usefixtures("store_all")
def test_a_second_run_loads_the_stored_order(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    built = IndexCache(corpus, None).get("key", lambda: epoch_order(corpus.sizes, 16, 5, 0))
    loaded = IndexCache(IndexedCorpus(tmp_path / "c"), None).get("key", must_not_build)
    assert all(np.array_equal(a, b) for a, b in zip(loaded, built, strict=True))
    assert isinstance(loaded.ends.base, np.ndarray) and not loaded.ends.flags.writeable  # a view of the mapped file


def test_other_tokens_with_equal_file_sizes_and_times_have_another_fingerprint(tmp_path: Path) -> None:
    before = corpus_fingerprint(write(tmp_path / "c"))
    times = {path: path.stat() for path in tmp_path.iterdir()}
    again = write(tmp_path / "c", seed=1)
    for path, status in times.items():
        assert path.stat().st_size == status.st_size
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert corpus_fingerprint(again) != before
    same = write(tmp_path / "c")
    for path, status in times.items():
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert corpus_fingerprint(same) == before
    os.utime(tmp_path / "c.bin", ns=(0, 1))
    assert corpus_fingerprint(same) != before


def test_the_content_fingerprint_of_a_copy_is_the_same_and_of_other_tokens_another(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    for suffix in (".bin", ".idx"):
        (tmp_path / f"copy{suffix}").write_bytes((tmp_path / f"c{suffix}").read_bytes())
    assert content_fingerprint(IndexedCorpus(tmp_path / "copy")) == content_fingerprint(corpus)
    assert content_fingerprint(write(tmp_path / "other", seed=1)) != content_fingerprint(corpus)


def test_a_replaced_corpus_does_not_get_the_order_of_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = samples(PackedCorpus(write(tmp_path / "new", sizes_seed=8), range(200), 16, 5))
    monkeypatch.setattr(index_cache, "MIN_SIZE", 0)
    PackedCorpus(write(tmp_path / "c"), range(200), 16, 5).sample(0)
    assert samples(PackedCorpus(write(tmp_path / "c", sizes_seed=8), range(200), 16, 5)) == in_memory
    assert len(list((tmp_path / "c.index").glob("*/ends.npy"))) == 2


@pytest.mark.usefixtures("store_all")
@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None])
def test_a_damaged_order_is_built_again(damage: bytes | None, tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    expected = samples(PackedCorpus(corpus, range(200), 16, 5))
    (array,) = (tmp_path / "c.index").glob("*/ends.npy")
    array.unlink() if damage is None else array.write_bytes(damage)
    assert samples(PackedCorpus(corpus, range(200), 16, 5)) == expected
    assert np.load(array).dtype == np.int64


@pytest.mark.usefixtures("store_all")
def test_an_order_with_one_changed_byte_is_built_again(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    expected = samples(PackedCorpus(corpus, range(200), 16, 5))
    (array,) = (tmp_path / "c.index").glob("*/documents.npy")
    content = array.read_bytes()
    array.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
    os.utime(array, ns=(0, 0))  # also if the file system's clock is coarse
    assert samples(PackedCorpus(corpus, range(200), 16, 5)) == expected
    assert array.read_bytes() == content


def test_a_stored_order_is_loaded_also_after_its_files_were_copied(tmp_path: Path) -> None:
    """A copy has other modification times, so the checksums decide."""
    corpus = write(tmp_path / "c")
    built = IndexCache(corpus, tmp_path / "cache").get("key", lambda: epoch_order(corpus.sizes, 16, 5, 0))
    for array in (tmp_path / "cache").glob("*/*.npy"):
        os.utime(array, ns=(0, 0))
    loaded = IndexCache(corpus, tmp_path / "cache").get("key", must_not_build)
    assert all(np.array_equal(a, b) for a, b in zip(loaded, built, strict=True))


@pytest.mark.usefixtures("store_all")
def test_without_a_writable_folder_beside_the_data_the_temporary_folder_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write(tmp_path / "c")
    (tmp_path / "c.index").write_text("a file with the name of the folder")  # root can write to read-only folders
    monkeypatch.setattr(index_cache.tempfile, "gettempdir", lambda: str(tmp_path / "t"))
    PackedCorpus(corpus, range(200), 16, 5).sample(0)
    (folder,) = (tmp_path / "t").iterdir()
    assert list(folder.glob("*/ends.npy")) and folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "t2").write_text("not a folder either")
    monkeypatch.setattr(index_cache.tempfile, "gettempdir", lambda: str(tmp_path / "t2"))
    PackedCorpus(corpus, range(200), 16, 5).sample(0)  # the order stays in memory


@pytest.mark.usefixtures("store_all")
def test_the_folder_in_the_config_is_used_or_is_an_error(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    PackedCorpus(corpus, range(200), 16, 5, tmp_path / "cache").sample(0)
    assert list((tmp_path / "cache").glob("*/ends.npy")) and not (tmp_path / "c.index").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir .*/file: cannot be written"):
        PackedCorpus(corpus, range(200), 16, 5, tmp_path / "file")


def test_small_orders_are_not_stored(tmp_path: Path) -> None:
    PackedCorpus(write(tmp_path / "c"), range(200), 16, 5).sample(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def build_slowly(prefix: str, log: str, started: Any) -> None:
    """In another process: get the order; write a line to `log` each time that it is built."""
    corpus = IndexedCorpus(prefix)

    def build() -> EpochOrder:
        with Path(log).open("a") as file:
            file.write("built\n")
        started.set()
        time.sleep(0.2)  # long enough for the other processes to start
        return epoch_order(corpus.sizes, 16, 5, 0)

    order = IndexCache(corpus, None).get("key", build)
    assert np.array_equal(order.documents, epoch_order(corpus.sizes, 16, 5, 0).documents)


def test_processes_that_start_together_build_the_order_once(tmp_path: Path) -> None:
    write(tmp_path / "c")
    context = mp.get_context("fork")
    started = context.Event()
    processes = [
        context.Process(target=build_slowly, args=(str(tmp_path / "c"), str(tmp_path / "log"), started)) for _ in range(6)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert (tmp_path / "log").read_text() == "built\n"


def build_without_end(prefix: str, started: Any) -> None:
    """In another process: start to build the order and wait until the process is killed."""

    def build() -> EpochOrder:
        started.set()
        signal.pause()
        raise AssertionError

    IndexCache(IndexedCorpus(prefix), None).get("key", build)


def test_the_next_process_builds_the_order_if_the_first_is_killed(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    context = mp.get_context("fork")
    started = context.Event()
    process = context.Process(target=build_without_end, args=(str(tmp_path / "c"), started))
    process.start()
    assert started.wait(60)
    process.kill()
    process.join()
    order = IndexCache(corpus, None).get("key", lambda: epoch_order(corpus.sizes, 16, 5, 0))
    assert order.ends[-1] == corpus.n_tokens


def test_without_file_locks_the_first_complete_order_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("this file system has no locks")

    monkeypatch.setattr(index_cache.fcntl, "flock", no_locks)
    corpus = write(tmp_path / "c")

    def slow() -> EpochOrder:  # another process stores the order while this one builds it
        IndexCache(corpus, None).get("key", lambda: epoch_order(corpus.sizes, 16, 5, 0))
        return epoch_order(corpus.sizes, 16, 5, 0)

    order = IndexCache(corpus, None).get("key", slow)
    assert order.ends[-1] == corpus.n_tokens
    assert len(list((tmp_path / "c.index").iterdir())) == 2  # the order and its lock
