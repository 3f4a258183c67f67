"""Training goes on while a checkpoint is written; what it is made of is the copy; a save that fails is loud and harmless."""

import contextlib
import errno
import io
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checkpoint.test_resume import config_of
from support.pool import Pool
from support.runs import corpus, open_trainer

from megagpt.checkpoint import save
from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.check import problems_of
from megagpt.checkpoint.load import Reader
from megagpt.checkpoint.save import Entry, Saver
from megagpt.config import Config
from megagpt.errors import CheckpointError
from megagpt.training.trainer import Batch, Trainer


def overwritten_while_it_is_written(folder: Path) -> tuple[torch.Tensor, bool]:
    """What is on disk of a tensor of ones that becomes twos before the first byte is written."""
    box = Box((0, 0), (4, 4))
    values, go_on = torch.ones(4, 4), threading.Event()
    real = save.write_safetensors

    def wait_first(*args: Any) -> Any:
        assert go_on.wait(30)
        return real(*args)

    with mock.patch.object(save, "write_safetensors", wait_first):
        saver = Saver(folder, 0, None, None)
        saver.start(3, [Entry("w", (4, 4), box, {"master": values})], {}, {})
        unfinished = saver.news() is None
        values.fill_(2)
        go_on.set()
        ended = saver.finish()
    assert ended is not None and ended.problem is None
    saver.close()
    return Reader(folder / "step_00000003").read("master", "w", box), unfinished


def test_a_later_step_does_not_leak_into_a_checkpoint(ranks: Pool, tmp_path: Path) -> None:
    ((on_disk, unfinished),) = ranks.run(1, overwritten_while_it_is_written, tmp_path)
    assert unfinished
    assert torch.equal(on_disk, torch.ones(4, 4))


def train_with(config: Config, each_step: Callable[[Trainer, Batch], None]) -> tuple[int, str]:
    """Train, with a call before each step; the steps made, and what was said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        trainer = open_trainer(config)
        advance = trainer.advance

        def step(batch: Batch) -> Any:
            each_step(trainer, batch)
            return advance(batch)

        with mock.patch.object(trainer, "advance", step):
            trainer.train()
    trainer.close()
    return trainer.step, said.getvalue()


def steps_during_a_save(config: Config) -> tuple[int, str]:
    """The save of step 2 is held until step 4 is being made: a save that training waited for would never end."""
    reached = threading.Event()
    real = save.write_safetensors

    def held(*args: Any) -> Any:
        assert reached.wait(30)
        return real(*args)

    with mock.patch.object(save, "write_safetensors", held):
        return train_with(config, lambda trainer, _: reached.set() if trainer.step == 3 else None)


def test_training_goes_on_while_files_are_written(ranks: Pool, tmp_path: Path) -> None:
    config = config_of(tmp_path, corpus(tmp_path), {}, 1, 5, checkpoint={"dir": str(tmp_path / "c"), "interval": 2})
    (steps, said), _ = ranks.run(2, steps_during_a_save, config)
    assert steps == 5
    assert said.index("saving step 2") < said.index("step 4/5") < said.index("step_00000002 in ")
    for step in (2, 4, 5):
        assert problems_of(tmp_path / "c" / f"step_{step:08d}") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_and_empty(config: Config, disk: Path) -> tuple[int, str]:
    """The disk is full at step 4, and has room again at step 6."""

    def each(trainer: Trainer, _: Batch) -> None:
        if dist.get_rank() or trainer.step not in (3, 5):
            return
        if trainer.step == 5:
            (disk / "other").unlink()
            return
        trainer._saves.finish()
        with contextlib.suppress(OSError), (disk / "other").open("wb") as file:
            while True:
                file.write(b"x" * 4096)
                file.flush()

    return train_with(config, each)


def test_a_full_disk_is_loud_and_training_goes_on(ranks: Pool, tmp_path: Path, small_disk: Path) -> None:
    config = config_of(tmp_path, corpus(tmp_path), {}, 1, 6, checkpoint={"dir": str(small_disk / "c"), "interval": 2})
    (steps, said), _ = ranks.run(2, fill_and_empty, config, small_disk)
    assert steps == 6
    assert "warning: NOT SAVED: the checkpoint of step 4: rank" in said and "No space left on device" in said
    assert "training goes on, and the checkpoints before it stay" in said
    assert sorted(path.name for path in (small_disk / "c").iterdir()) == ["latest", "step_00000002", "step_00000006"]
    assert problems_of(small_disk / "c" / "step_00000002") == []
    assert problems_of(small_disk / "c" / "step_00000006") == []


def failing_on_one_rank(config: Config) -> tuple[str, str]:
    """Rank 1's disk is full from the beginning; the error that the run ends with, and what was said."""
    said = io.StringIO()

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with contextlib.redirect_stderr(said), contextlib.ExitStack() as stack:
        trainer = open_trainer(config)
        if dist.get_rank() == 1:
            stack.enter_context(mock.patch.object(save, "write_safetensors", full))
        try:
            trainer.train()
        except CheckpointError as error:
            return str(error), said.getvalue()
        finally:
            trainer.close()
    return "", said.getvalue()


def test_one_rank_that_cannot_write_fails_the_save_for_all_and_the_last_one_the_run(ranks: Pool, tmp_path: Path) -> None:
    config = config_of(tmp_path, corpus(tmp_path), {}, 1, 5, checkpoint={"dir": str(tmp_path / "c"), "interval": 2})
    results = ranks.run(3, failing_on_one_rank, config_of_three(config))
    for error, _ in results:
        assert "the checkpoint of step 5 could not be saved: rank 1: [Errno 28] No space left on device" in error
    assert results[0][1].count("NOT SAVED") == 3
    assert list((tmp_path / "c").iterdir()) == []


def config_of_three(config: Config) -> Config:
    """With a batch that three ranks can share."""
    return config.model_copy(update={"training": config.training.model_copy(update={"global_batch_size": 6})})


def moved_to_other_disks(config: Config, folders: list[str]) -> str:
    """Rank 1's folder becomes another one than rank 0's after the start, as when a mount is lost; what was said."""
    rank, here, said = dist.get_rank(), Path.cwd(), io.StringIO()
    os.chdir(folders[0])
    try:
        with contextlib.redirect_stderr(said), mock.patch.object(socket, "gethostname", lambda: f"node{rank}"):
            trainer = open_trainer(config)
            os.chdir(folders[rank])
            trainer._save()
            with pytest.raises(CheckpointError):
                trainer._saves.finish(required=True)
        trainer.close()
    finally:
        os.chdir(here)
    return said.getvalue()


def test_a_save_to_disks_of_single_nodes_names_them_and_is_none(ranks: Pool, tmp_path: Path) -> None:
    disks = [tmp_path / "disk0", tmp_path / "disk1"]
    for disk in disks:
        disk.mkdir()
    config = config_of(tmp_path, corpus(tmp_path), {"tensor": 2}, 1, 5, checkpoint={"dir": "c"})
    said = ranks.run(2, moved_to_other_disks, config, list(map(str, disks)))[0]
    assert "node node0 does not see what was written on node1" in said
    assert not list(tmp_path.rglob("step_*"))


def test_what_is_read_back_must_be_what_was_written(ranks: Pool, tmp_path: Path) -> None:
    config = config_of(tmp_path, corpus(tmp_path), {}, 1, 2, checkpoint={"dir": str(tmp_path / "c")})
    (error,) = ranks.run(1, on_a_disk_that_lies, config)
    assert "rank_00000.safetensors: what was read back is not what was written" in error


def on_a_disk_that_lies(config: Config) -> str:
    real = save.write_safetensors

    def lie(path: Path, *args: Any) -> Any:
        written = real(path, *args)
        content = bytearray(path.read_bytes())
        content[-1] ^= 4
        path.write_bytes(content)
        return written

    with mock.patch.object(save, "write_safetensors", lie), contextlib.redirect_stderr(io.StringIO()):
        trainer = open_trainer(config)
        try:
            trainer.train()
        except CheckpointError as error:
            return str(error)
        finally:
            trainer.close()
    return ""


def prepared(folder: Path) -> tuple[bool, torch.Tensor]:
    """Whether a save uses the memory that was prepared for it, and what it wrote."""
    box = Box((0, 0), (4, 4))
    entries = [Entry("w", (4, 4), box, {"master": torch.ones(4, 4), "exp_avg": torch.zeros(4, 4)})]
    saver = Saver(folder, 0, None, None)
    saver.prepare(entries).result()
    place = saver._copy._buffer.data_ptr()
    saver.start(1, entries, {}, {})
    same = saver._copy._buffer.data_ptr() == place
    saver.close()
    return same, Reader(folder / "step_00000001").read("master", "w", box)


def test_memory_that_was_made_ahead_is_what_a_save_uses(ranks: Pool, tmp_path: Path) -> None:
    ((same, on_disk),) = ranks.run(1, prepared, tmp_path)
    assert same and torch.equal(on_disk, torch.ones(4, 4))


def saving_beside_what_cannot_be_deleted(folder: Path) -> list[Any]:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), "step_00000001")

    saver = Saver(folder, 1, None, None)
    with mock.patch.object(save, "remove_old", refuse):
        saver.start(2, [Entry("w", (4,), Box((0,), (4,)), {"master": torch.ones(4)})], {}, {})
        ended = saver.finish()
    saver.close()
    assert ended is not None
    return [ended.problem, ended.left_over, problems_of(folder / "step_00000002")]


def test_an_older_one_that_cannot_be_deleted_takes_nothing_from_the_new_one(ranks: Pool, tmp_path: Path) -> None:
    ((problem, left_over, wrong),) = ranks.run(1, saving_beside_what_cannot_be_deleted, tmp_path)
    assert problem is None and wrong == []
    assert "Operation not permitted: 'step_00000001'" in left_over
    assert (tmp_path / "latest").read_text() == "step_00000002\n"


def with_ranks_that_lose_touch(folder: Path) -> list[str]:
    """All but rank 0 hear no more of a save that rank 0 then completes; what is wrong with it."""
    rank, heard = dist.get_rank(), folder / "heard"

    def lost(*_: Any, **__: Any) -> None:
        if rank:
            raise RuntimeError("Connection closed by peer")

    def wait_first(*args: Any) -> Any:
        while not heard.exists():
            threading.Event().wait(0.01)
        return real(*args)

    real = save.write_manifest
    values = {"master": torch.full((1, 4), float(rank))}
    saver = Saver(folder / "c", 1, None, None)
    with mock.patch.object(save, "write_manifest", wait_first), mock.patch.object(dist, "broadcast_object_list", lost):
        saver.start(1, [Entry("w", (2, 4), Box((rank, 0), (1, 4)), values)], {}, {})
        ended = saver.finish() if rank else None
        if ended is not None:
            assert ended.problem is not None
            heard.touch()
        saver.close()
    dist.barrier()
    return problems_of(folder / "c" / "step_00000001")


def test_a_rank_that_loses_touch_takes_nothing_from_a_checkpoint_that_becomes_whole(ranks: Pool, tmp_path: Path) -> None:
    assert ranks.run(2, with_ranks_that_lose_touch, tmp_path) == [[], []]
