"""Training continues while a checkpoint is written, the checkpoint is the copied state, and a failed save is reported."""

import contextlib
import errno
import io
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.checkpoints import AfterStep, run_config
from support.pool import Pool
from support.runs import corpus, open_trainer

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.files import write_safetensors
from megagpt.checkpoint.load import CheckpointReader
from megagpt.checkpoint.save import AsyncSaver, Entry, SaveResult
from megagpt.checkpoint.verify import local_problems
from megagpt.checkpoint.write import WriteFile, commit
from megagpt.config import Config
from megagpt.errors import CheckpointError
from megagpt.training.checkpointing import Checkpointer
from megagpt.training.train_state import RunProgress
from megagpt.training.trainer import Trainer

FULL = Box.full((4, 4))


def write_after(event: threading.Event) -> WriteFile:
    """Return a writer that first waits for the event."""

    def write(*args: Any) -> Any:
        assert event.wait(30)
        return write_safetensors(*args)

    return write


def raise_disk_full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def use_writer(trainer: Trainer, write_file: WriteFile) -> None:
    """Let the trainer save with another writer."""
    trainer.checkpointer.close()
    trainer.checkpointer = Checkpointer(trainer.engine, None, trainer.step, write_file=write_file)


def change_during_the_write(folder: Path) -> tuple[torch.Tensor, bool]:
    """Save a tensor of ones that becomes twos before the first byte is written; return what is on disk."""
    values, changed = torch.ones(4, 4), threading.Event()
    saver = AsyncSaver(folder, 0, None, None, write_file=write_after(changed))
    saver.start(3, [Entry("w", (4, 4), FULL, {"master": values})], {}, {})
    unfinished = saver.poll() is None
    values.fill_(2)
    changed.set()
    result = saver.finish()
    assert result is not None and result.problem is None
    saver.close()
    return CheckpointReader(folder / "step_00000003").read("master", "w", FULL), unfinished


def test_a_checkpoint_contains_the_state_at_the_save_and_no_later_step(ranks: Pool, tmp_path: Path) -> None:
    ((on_disk, unfinished),) = ranks.run(1, change_during_the_write, tmp_path)
    assert unfinished
    assert torch.equal(on_disk, torch.ones(4, 4))


def train(config: Config, after_step: Callable[[Trainer], None], write_file: WriteFile | None = None) -> tuple[int, str]:
    """Train, with a call after each step; return the number of steps and the output."""
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        trainer = open_trainer(config)
        if write_file is not None:
            use_writer(trainer, write_file)
        trainer.logger = AfterStep(trainer.logger, lambda: after_step(trainer))
        trainer.train()
    trainer.close()
    return trainer.step, output.getvalue()


def hold_the_save_of_step_2(config: Config) -> tuple[int, str]:
    """Let the save of step 2 end after step 4 only: if training waited for it, neither would end."""
    reached = threading.Event()

    def after_step(trainer: Trainer) -> None:
        if trainer.step == 4:
            reached.set()

    return train(config, after_step, write_after(reached))


def test_training_continues_while_files_are_written(ranks: Pool, tmp_path: Path) -> None:
    config = run_config(tmp_path, corpus(tmp_path), {}, 1, 5, checkpoint={"dir": str(tmp_path / "c"), "interval": 2})
    (steps, output), _ = ranks.run(2, hold_the_save_of_step_2, config)
    assert steps == 5
    assert output.index("saving step 2") < output.index("step 4/5") < output.index("step_00000002 in ")
    for step in (2, 4, 5):
        assert local_problems(tmp_path / "c" / f"step_{step:08d}") == []


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
    """Train with a disk that is full at step 4 and has room again at step 6."""

    def after_step(trainer: Trainer) -> None:
        if dist.get_rank() or trainer.step not in (3, 5):
            return
        if trainer.step == 5:
            (disk / "other").unlink()
            return
        trainer.checkpointer.finish()
        with contextlib.suppress(OSError), (disk / "other").open("wb") as file:
            while True:
                file.write(b"x" * 4096)
                file.flush()

    return train(config, after_step)


def test_a_full_disk_is_reported_and_training_continues(ranks: Pool, tmp_path: Path, small_disk: Path) -> None:
    config = run_config(tmp_path, corpus(tmp_path), {}, 1, 6, checkpoint={"dir": str(small_disk / "c"), "interval": 2})
    (steps, output), _ = ranks.run(2, fill_and_empty, config, small_disk)
    assert steps == 6
    assert "warning: NOT SAVED: the checkpoint of step 4: rank" in output and "No space left on device" in output
    assert "training continues, and the earlier checkpoints are unchanged" in output
    assert sorted(path.name for path in (small_disk / "c").iterdir()) == ["latest", "step_00000002", "step_00000006"]
    assert local_problems(small_disk / "c" / "step_00000002") == []
    assert local_problems(small_disk / "c" / "step_00000006") == []


def train_with_a_full_disk_on_rank_1(config: Config) -> tuple[str, str]:
    """Return the error that the run ends with, and what it printed on stderr."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        trainer = open_trainer(config)
        use_writer(trainer, raise_disk_full if dist.get_rank() == 1 else write_safetensors)  # collective
        try:
            trainer.train()
        except CheckpointError as error:
            return str(error), stderr.getvalue()
        finally:
            trainer.close()
    return "", stderr.getvalue()


def test_if_one_rank_cannot_write_no_rank_has_saved_and_if_it_is_the_last_save_the_run_fails(
    ranks: Pool, tmp_path: Path
) -> None:
    config = run_config(tmp_path, corpus(tmp_path), {}, 1, 5, checkpoint={"dir": str(tmp_path / "c"), "interval": 2})
    results = ranks.run(3, train_with_a_full_disk_on_rank_1, with_batch_for_three_ranks(config))
    for error, _ in results:
        assert "the checkpoint of step 5 could not be saved: rank 1: [Errno 28] No space left on device" in error
    assert results[0][1].count("NOT SAVED") == 3
    assert list((tmp_path / "c").iterdir()) == []


def with_batch_for_three_ranks(config: Config) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update={"global_batch_size": 6})})


def save_to_different_disks(config: Config, folders: list[str]) -> str:
    """Give rank 1 another folder than rank 0 after the start, like a mount that is lost; return stderr."""
    rank, original, stderr = dist.get_rank(), Path.cwd(), io.StringIO()
    os.chdir(folders[0])
    try:
        with contextlib.redirect_stderr(stderr), mock.patch.object(socket, "gethostname", lambda: f"node{rank}"):
            trainer = open_trainer(config)
            os.chdir(folders[rank])
            trainer.checkpointer.save(trainer.step, RunProgress(consumed_samples=0))
            with pytest.raises(CheckpointError):
                trainer.checkpointer.finish(required=True)
        trainer.close()
    finally:
        os.chdir(original)
    return stderr.getvalue()


def test_a_save_to_disks_of_single_nodes_fails_and_names_the_nodes(ranks: Pool, tmp_path: Path) -> None:
    disks = [tmp_path / "disk0", tmp_path / "disk1"]
    for disk in disks:
        disk.mkdir()
    config = run_config(tmp_path, corpus(tmp_path), {"tensor": 2}, 1, 5, checkpoint={"dir": "c"})
    output = ranks.run(2, save_to_different_disks, config, list(map(str, disks)))[0]
    assert "node node0 does not see what was written on node1" in output
    assert not list(tmp_path.rglob("step_*"))


def write_to_a_faulty_disk(path: Path, *args: Any) -> Any:
    """Write the file, then flip a bit on disk."""
    written = write_safetensors(path, *args)
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    return written


def save_on_a_faulty_disk(folder: Path) -> str | None:
    saver = AsyncSaver(folder, 0, None, None, write_file=write_to_a_faulty_disk)
    saver.start(2, [Entry("w", (4, 4), FULL, {"master": torch.ones(4, 4)})], {}, {})
    result = saver.finish()
    saver.close()
    assert result is not None
    return result.problem


def test_a_save_fails_if_the_data_read_back_differs(ranks: Pool, tmp_path: Path) -> None:
    (problem,) = ranks.run(1, save_on_a_faulty_disk, tmp_path)
    assert "rank_00000.safetensors: the data read back differs from the data written" in problem
    assert list(tmp_path.iterdir()) == []


def save_into_prepared_memory(folder: Path) -> tuple[bool, torch.Tensor]:
    """Return whether a save uses the memory that was allocated before, and what it wrote."""
    entries = [Entry("w", (4, 4), FULL, {"master": torch.ones(4, 4), "exp_avg": torch.zeros(4, 4)})]
    saver = AsyncSaver(folder, 0, None, None)
    saver.prepare(entries).result()
    address = saver.host_buffer.tensor.data_ptr()
    saver.start(1, entries, {}, {})
    same = saver.host_buffer.tensor.data_ptr() == address
    saver.close()
    return same, CheckpointReader(folder / "step_00000001").read("master", "w", FULL)


def test_a_save_uses_the_memory_that_was_allocated_before(ranks: Pool, tmp_path: Path) -> None:
    ((same, on_disk),) = ranks.run(1, save_into_prepared_memory, tmp_path)
    assert same and torch.equal(on_disk, torch.ones(4, 4))


def save_beside_an_undeletable_checkpoint(folder: Path) -> SaveResult:
    """Save with keep = 1 while the older checkpoint cannot be renamed: its new name belongs to a non-empty folder."""
    (folder / "step_00000001").mkdir()
    (folder / "step_00000001" / "manifest.json").touch()
    (folder / "step_00000001.deleting" / "occupied").mkdir(parents=True)
    saver = AsyncSaver(folder, 1, None, None)
    saver.start(2, [Entry("w", (4,), Box((0,), (4,)), {"master": torch.ones(4)})], {}, {})
    result = saver.finish()
    saver.close()
    assert result is not None
    return result


def test_an_old_checkpoint_that_cannot_be_deleted_is_reported_and_the_new_one_is_complete(ranks: Pool, tmp_path: Path) -> None:
    (result,) = ranks.run(1, save_beside_an_undeletable_checkpoint, tmp_path)
    assert result.problem is None and local_problems(tmp_path / "step_00000002") == []
    assert "Directory not empty" in result.left_over and "step_00000001" in result.left_over
    assert (tmp_path / "latest").read_text() == "step_00000002\n"


def lose_rank_1_during_the_commit(folder: Path) -> list[str]:
    """Let rank 1 give up while rank 0 commits the checkpoint; return the problems of the checkpoint."""
    rank, given_up = dist.get_rank(), folder / "given up"

    def commit_late(*args: Any) -> None:
        while not given_up.exists():
            threading.Event().wait(0.01)
        commit(*args)

    max_wait = timedelta(seconds=4 if rank else 60)
    saver = AsyncSaver(folder / "c", 1, None, None, commit=commit_late, max_wait=max_wait)
    saver.start(1, [Entry("w", (2, 4), Box((rank, 0), (1, 4)), {"master": torch.full((1, 4), float(rank))})], {}, {})
    if rank:
        result = saver.finish()
        assert result is not None and result.problem is not None
        given_up.touch()
    saver.close()
    dist.barrier()
    return local_problems(folder / "c" / "step_00000001")


def test_a_rank_that_loses_contact_removes_nothing_from_a_checkpoint_that_is_then_completed(
    ranks: Pool, tmp_path: Path
) -> None:
    assert ranks.run(2, lose_rank_1_during_the_commit, tmp_path) == [[], []]
