"""Orders on disk: the same as in memory, built once however many start, never met by other data."""

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
from megagpt.data.index_cache import IndexCache, fingerprint
from megagpt.data.indexed import IndexedCorpus, IndexedWriter
from megagpt.data.shuffle import Order, epoch_order
from megagpt.errors import DataError


def write(prefix: Path, seed: int = 0, documents: int = 200) -> IndexedCorpus:
    generator = np.random.default_rng(seed)
    sizes = np.random.default_rng(9).integers(1, 40, documents)
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_documents(generator.integers(0, 1000, int(sizes.sum())).astype(np.uint16), sizes)
    return IndexedCorpus(prefix)


def samples(packed: PackedCorpus, count: int = 30) -> list[list[int]]:
    return [packed.sample(index).tokens.tolist() for index in range(count)]


def refuse() -> Order:
    raise AssertionError("built although it was there")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders of every size are kept."""
    monkeypatch.setattr(index_cache, "SMALLEST", 0)


def test_a_kept_order_gives_the_samples_of_one_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write(tmp_path / "c")
    in_memory = samples(PackedCorpus(corpus, range(10, 150), 16, 5), 300)  # several epochs
    monkeypatch.setattr(index_cache, "SMALLEST", 0)
    for _ in range(2):
        assert samples(PackedCorpus(corpus, range(10, 150), 16, 5), 300) == in_memory
    assert (tmp_path / "c.index").is_dir()


@pytest.mark.usefixtures("small")
def test_a_second_run_finds_the_order(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    built = IndexCache(corpus, None).get("key", lambda: epoch_order(corpus.sizes, 16, 5, 0))
    found = IndexCache(IndexedCorpus(tmp_path / "c"), None).get("key", refuse)
    assert all(np.array_equal(a, b) for a, b in zip(found, built, strict=True))
    assert isinstance(found.ends.base, np.ndarray) and not found.ends.flags.writeable  # a view of the mapped file


def test_other_tokens_of_the_same_sizes_and_times_have_another_fingerprint(tmp_path: Path) -> None:
    before = fingerprint(write(tmp_path / "c"))
    times = {path: path.stat() for path in tmp_path.iterdir()}
    again = write(tmp_path / "c", seed=1)
    for path, status in times.items():
        assert path.stat().st_size == status.st_size
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(again) != before
    same = write(tmp_path / "c")
    for path, status in times.items():
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(same) == before
    os.utime(tmp_path / "c.bin", ns=(0, 1))
    assert fingerprint(same) != before


@pytest.mark.usefixtures("small")
def test_a_replaced_corpus_never_meets_an_old_order(tmp_path: Path) -> None:
    PackedCorpus(write(tmp_path / "c"), range(200), 16, 5).sample(0)
    corpus = write(tmp_path / "c", documents=100)
    order = epoch_order(corpus.sizes, 16, 5, 0)
    packed = PackedCorpus(corpus, range(100), 16, 5)
    assert np.array_equal(packed._order(0).documents, order.documents)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None])
def test_a_damaged_order_is_built_again(damage: bytes | None, tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    expected = samples(PackedCorpus(corpus, range(200), 16, 5))
    (part,) = (tmp_path / "c.index").glob("*/ends.npy")
    part.unlink() if damage is None else part.write_bytes(damage)
    assert samples(PackedCorpus(corpus, range(200), 16, 5)) == expected
    assert np.load(part).dtype == np.int64


@pytest.mark.usefixtures("small")
def test_a_folder_that_cannot_be_written_is_replaced_by_the_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write(tmp_path / "c")
    (tmp_path / "c.index").write_text("a file where the folder would be")  # root may write everywhere else
    monkeypatch.setattr(index_cache.tempfile, "gettempdir", lambda: str(tmp_path / "t"))
    PackedCorpus(corpus, range(200), 16, 5).sample(0)
    (folder,) = (tmp_path / "t").iterdir()
    assert list(folder.glob("*/ends.npy")) and folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "t2").write_text("no folder either")
    monkeypatch.setattr(index_cache.tempfile, "gettempdir", lambda: str(tmp_path / "t2"))
    PackedCorpus(corpus, range(200), 16, 5).sample(0)  # in memory


@pytest.mark.usefixtures("small")
def test_the_folder_that_the_config_names_is_used_or_refused(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    PackedCorpus(corpus, range(200), 16, 5, tmp_path / "cache").sample(0)
    assert list((tmp_path / "cache").glob("*/ends.npy")) and not (tmp_path / "c.index").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir .*/file: cannot be written"):
        PackedCorpus(corpus, range(200), 16, 5, tmp_path / "file")


def test_small_orders_leave_no_file(tmp_path: Path) -> None:
    PackedCorpus(write(tmp_path / "c"), range(200), 16, 5).sample(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def build_slowly(prefix: str, log: str, started: Any) -> None:
    """In another process: get the order, and write a line for each time that it is built."""
    corpus = IndexedCorpus(prefix)

    def build() -> Order:
        with Path(log).open("a") as file:
            file.write("built\n")
        started.set()
        time.sleep(0.2)  # long enough for the others to come
        return epoch_order(corpus.sizes, 16, 5, 0)

    order = IndexCache(corpus, None).get("key", build)
    assert np.array_equal(order.documents, epoch_order(corpus.sizes, 16, 5, 0).documents)


def test_many_that_start_together_build_once(tmp_path: Path) -> None:
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


def build_for_ever(prefix: str, started: Any) -> None:
    def build() -> Order:
        started.set()
        signal.pause()
        raise AssertionError

    IndexCache(IndexedCorpus(prefix), None).get("key", build)


def test_a_builder_that_is_killed_leaves_the_work_to_the_next(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c")
    context = mp.get_context("fork")
    started = context.Event()
    process = context.Process(target=build_for_ever, args=(str(tmp_path / "c"), started))
    process.start()
    assert started.wait(60)
    process.kill()
    process.join()
    order = IndexCache(corpus, None).get("key", lambda: epoch_order(corpus.sizes, 16, 5, 0))
    assert order.ends[-1] == corpus.n_tokens


def test_without_locks_whoever_is_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("this file system has no locks")

    monkeypatch.setattr(index_cache.fcntl, "flock", no_locks)
    corpus = write(tmp_path / "c")

    def slow() -> Order:  # while this one builds, another comes and is done
        IndexCache(corpus, None).get("key", lambda: epoch_order(corpus.sizes, 16, 5, 0))
        return epoch_order(corpus.sizes, 16, 5, 0)

    order = IndexCache(corpus, None).get("key", slow)
    assert order.ends[-1] == corpus.n_tokens
    assert len(list((tmp_path / "c.index").iterdir())) == 2  # the order and its lock
