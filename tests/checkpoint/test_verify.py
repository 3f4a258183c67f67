"""Damage is found before training and named, and damaged files are never loaded; no code is run from any file."""

import contextlib
import errno
import io
import os
import pickle
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.checkpoints import run_config
from support.pool import Pool
from support.runs import Tree, corpus, open_trainer, run_trainer
from support.saved import rewrite_manifest, update_checksum, update_manifest_checksum

from megagpt.checkpoint.shared_filesystem import require_shared
from megagpt.config import Config
from megagpt.config.schema import CheckpointConfig
from megagpt.errors import CheckpointError
from megagpt.training.checkpointing import find_checkpoint, open_checkpoint_folder


@pytest.fixture(scope="module")
def saved(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2 and 4, by two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoint: Tree = {"checkpoint": {"dir": str(folder / "checkpoints"), "interval": 2}}
    ranks.run(2, run_trainer, run_config(folder, corpus(folder), {"tensor": 2}, 1, 4, **checkpoint))
    return folder / "checkpoints"


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


class Search(NamedTuple):
    """Result of the search for a checkpoint to resume from, on one rank."""

    name: str | None
    """Name of the checkpoint's folder; None if there is none."""
    warnings: str
    """Printed on rank 0."""
    error: str


def find(config: CheckpointConfig) -> Search:
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            lock = open_checkpoint_folder(config)
            folder = find_checkpoint(config)
            if lock is not None:
                lock.release()
        except CheckpointError as error:
            return Search(None, stderr.getvalue(), str(error))
    return Search(folder.name if folder else None, stderr.getvalue(), "")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_middle_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def truncate_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-6])


def replace_by_step_2(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step_00000002"), path)


def plant(path: Path) -> None:
    path.write_bytes(b"a foreign file")


def take_from_older(path: Path) -> None:
    shutil.copy(path.parent.parent / "step_00000002" / path.name, path)


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated": ("rank_00001.safetensors", truncate, r"rank_00001.safetensors: \d+ bytes, expected \d+"),
    "longer": ("rank_00001.safetensors", grow, r"rank_00001.safetensors: \d+ bytes, expected \d+"),
    "a flipped bit": (
        "rank_00000.safetensors",
        flip_middle_bit,
        "rank_00000.safetensors: its SHA-256 differs from the manifest's",
    ),
    "missing": ("rank_00001.safetensors", Path.unlink, "rank_00001.safetensors: missing; node .+ wrote it"),
    "of another checkpoint": ("rank_00000.safetensors", take_from_older, "rank_00000.safetensors: its SHA-256"),
    "foreign": ("rank_00007.safetensors", plant, "rank_00007.safetensors: not a file of this checkpoint"),
    "a link to nowhere": (
        "rank_00001.safetensors",
        lambda path: (path.unlink(), path.symlink_to("/nowhere")),
        "rank_00001.safetensors: missing; node .+ wrote it",
    ),
    "a pipe": (
        "rank_00001.safetensors",
        lambda path: (path.unlink(), os.mkfifo(path)),
        "rank_00001.safetensors: not a regular file",
    ),
    "a manifest that is a device": (
        "manifest.json",
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        "manifest.json: not a regular file",
    ),
    "a checksum line that is cut": ("manifest.sha256", truncate_end, "manifest.sha256: not a line of sha256sum"),
    "a checksum line that is longer": ("manifest.sha256", grow, "manifest.sha256: not a line of sha256sum"),
    "another step": (".", replace_by_step_2, "manifest.json: it is the manifest of step 2; the folder's name is step_00000004"),
    "no manifest": ("manifest.json", Path.unlink, "manifest.json: No such file"),
    "an empty manifest": ("manifest.json", lambda path: path.write_bytes(b""), "manifest.json: its SHA-256"),
    "a flipped bit in the manifest": ("manifest.json", flip_middle_bit, "manifest.json: its SHA-256"),
    "no checksum of the manifest": ("manifest.sha256", Path.unlink, "manifest.sha256: No such file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_run_resumes_from_the_newest_complete_checkpoint(name: str, run: Path, ranks: Pool) -> None:
    file, damage, message = DAMAGE[name]
    damage(run / "step_00000004" / file)
    result = ranks.run(2, find, CheckpointConfig(dir=str(run)))[0]
    assert (result.name, result.error) == ("step_00000002", "")
    assert result.warnings.count("resuming from") == 1
    assert re.search(message, result.warnings), result.warnings


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_that_was_requested_by_path_is_an_error(name: str, run: Path, ranks: Pool) -> None:
    file, damage, message = DAMAGE[name]
    damage(run / "step_00000004" / file)
    for result in ranks.run(2, find, CheckpointConfig(resume=str(run / "step_00000004"))):
        assert result.name is None
        assert re.search(message, result.error), result.error


def test_an_undamaged_run_resumes_from_its_newest_checkpoint_without_a_warning(run: Path, ranks: Pool) -> None:
    assert ranks.run(2, find, CheckpointConfig(dir=str(run)))[0] == ("step_00000004", "", "")


def test_hidden_files_of_the_file_system_are_not_reported_as_damage(run: Path, ranks: Pool) -> None:
    (run / "step_00000004" / ".nfs0001").write_bytes(b"x")
    assert ranks.run(2, find, CheckpointConfig(dir=str(run)))[0] == ("step_00000004", "", "")


@pytest.mark.parametrize("text", ["step_00000009", "../../etc", "", "step_00000004/../step_00000002"])
def test_a_latest_file_that_names_no_checkpoint_is_reported_and_ignored(text: str, run: Path, ranks: Pool) -> None:
    (run / "latest").write_text(text)
    result = ranks.run(2, find, CheckpointConfig(dir=str(run)))[0]
    assert (result.name, result.error) == ("step_00000004", "")
    assert f"latest: names {text!r}, which is not a checkpoint in this folder" in result.warnings


def test_latest_may_be_set_back_by_hand(run: Path, ranks: Pool) -> None:
    (run / "latest").write_text("step_00000002\n")
    assert ranks.run(2, find, CheckpointConfig(dir=str(run)))[0].name == "step_00000002"


def test_a_folder_left_by_an_interrupted_save_is_named_and_removed(run: Path, ranks: Pool) -> None:
    (run / "step_00000004" / "manifest.json").unlink()
    (run / "step_00000004").rename(run / "step_00000004.writing-0a1b2c3d")
    result = ranks.run(2, find, CheckpointConfig(dir=str(run)))[0]
    assert result.name == "step_00000002"
    assert "step_00000004.writing-0a1b2c3d: left by an interrupted save or deletion; removed" in result.warnings
    assert "latest: names 'step_00000004'" in result.warnings
    assert not list(run.glob("*writing*"))


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_latest_file_without_any_checkpoint_is_an_error(resume: str, ranks: Pool, tmp_path: Path) -> None:
    """A volume that is not mounted looks like this: the run must not start from scratch."""
    (tmp_path / "latest").write_text("step_00000900\n")
    for result in ranks.run(2, find, CheckpointConfig(dir=str(tmp_path), resume=resume)):
        assert "latest: names 'step_00000900'" in result.error and "is the volume mounted" in result.error


@pytest.mark.parametrize("name", ["step_00000004/manifest.json", "step_00000004/rank_00001.safetensors"])
def test_a_file_that_cannot_be_read_is_an_error_and_no_older_checkpoint_is_used(name: str, run: Path, ranks: Pool) -> None:
    """It may be intact, and the run would replace the newer checkpoint."""
    for result in ranks.run(2, find_without_reading, CheckpointConfig(dir=str(run)), str(run / name)):
        assert result.name is None
        assert f"{run / name}: Input/output error; the checkpoint may be intact" in result.error


def find_without_reading(config: CheckpointConfig, path: str) -> Search:
    """Search while the disk fails to read `path`."""
    original = Path.open

    def open_file(self: Path, *args: Any, **options: Any) -> Any:
        if str(self) == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return original(self, *args, **options)

    with mock.patch.object(Path, "open", open_file):
        return find(config)


def test_if_no_checkpoint_is_complete_the_run_does_not_start_from_scratch(run: Path, ranks: Pool) -> None:
    truncate(run / "step_00000002" / "rank_00000.safetensors")
    (run / "step_00000004" / "manifest.json").unlink()
    error = ranks.run(2, find, CheckpointConfig(dir=str(run)))[1].error
    assert "no complete checkpoint found" in error
    assert "step_00000004/manifest.json: No such file" in error and "step_00000002/rank_00000.safetensors:" in error


def test_a_run_from_scratch_does_not_overwrite_another_run(run: Path, ranks: Pool) -> None:
    error = ranks.run(2, find, CheckpointConfig(dir=str(run), resume="never"))[0].error
    assert 'checkpoint.resume: "never", but checkpoint.dir' in error and "the newest is step_00000004" in error


@pytest.mark.parametrize("path", ["nowhere", "run"])
def test_a_path_without_a_checkpoint_is_an_error(path: str, ranks: Pool, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    error = ranks.run(2, find, CheckpointConfig(resume=str(tmp_path / path)))[1].error
    assert f"{tmp_path / path}: no checkpoint here" in error


def test_a_checkpoint_dir_that_cannot_be_created_is_an_error_before_the_first_step(ranks: Pool, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for result in ranks.run(2, find, CheckpointConfig(dir=str(tmp_path / "file" / "checkpoints"))):
        assert "checkpoints cannot be written: Not a directory; set another folder" in result.error


class Evil:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", ["pickle", "torch.save"])
@pytest.mark.parametrize("file", ["manifest.json", "rank_00000.safetensors", "latest"])
def test_a_malicious_pickle_is_refused_and_not_run(file: str, protocol: str, run: Path, ranks: Pool, tmp_path: Path) -> None:
    """The checksums accept it, so they are not what protects the run."""
    folder, victim = run / "step_00000004", tmp_path / "executed"
    path = run / file if file == "latest" else folder / file
    size = path.stat().st_size
    if protocol == "pickle":
        path.write_bytes(pickle.dumps(Evil(victim)))
    else:
        torch.save(Evil(victim), path)
    if file == "rank_00000.safetensors":  # a file that is smaller than its boxes would be refused unopened
        with path.open("ab") as stream:
            stream.write(bytes(max(0, size - path.stat().st_size)))
    if file == "manifest.json":
        update_manifest_checksum(folder)
    elif file != "latest":
        update_checksum(folder, file)
    checkpoint: Tree = {"checkpoint": {"dir": str(run)}}
    results = ranks.run(2, first_step_or_error, run_config(tmp_path, corpus(tmp_path), {"tensor": 2}, 1, 4, **checkpoint))
    if file == "rank_00000.safetensors":  # detected when the file is opened
        assert all("rank_00000.safetensors: cannot be read" in result for result in results)
    else:
        assert results[0] == ("step 4" if file == "latest" else "step 2")
    assert not victim.exists()


def first_step_or_error(config: Config) -> str:
    """Return the step at which a trainer starts, or its error."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            trainer = open_trainer(config)
        except CheckpointError as error:
            return str(error)
    step = trainer.step
    trainer.close()
    return f"step {step}"


def test_a_manifest_cannot_name_a_file_in_another_folder(run: Path, ranks: Pool) -> None:
    folder = run / "step_00000004"

    def change(manifest: Tree) -> None:
        manifest["files"][0]["name"] = "../step_00000002/rank_00000.safetensors"

    rewrite_manifest(folder, change)
    error = ranks.run(2, find, CheckpointConfig(resume=str(folder)))[0].error
    assert "not a megagpt-checkpoint of version 2: files.0.name" in error


@contextlib.contextmanager
def own_node(folders: list[str]) -> Any:
    """Put each rank on a node of its own, whose working directory is its own disk."""
    rank, original = dist.get_rank(), Path.cwd()
    os.chdir(folders[rank])
    try:
        with mock.patch.object(socket, "gethostname", lambda: f"node{rank}"):
            yield
    finally:
        os.chdir(original)


def shared_error(folders: list[str]) -> str:
    """Return the error of the test that all nodes share "checkpoints"."""
    with own_node(folders), pytest.raises(CheckpointError) as error:
        require_shared(Path("checkpoints"), max_delay=0.3)
    return str(error.value)


def find_on_own_node(folders: list[str], config: CheckpointConfig) -> Search:
    with own_node(folders):
        return find(config)


def test_nodes_that_write_to_their_own_disks_are_named_before_the_first_step(ranks: Pool, tmp_path: Path) -> None:
    disks = [tmp_path / f"disk{rank}" for rank in range(3)]
    for disk in disks:
        disk.mkdir()
    for error in ranks.run(3, shared_error, list(map(str, disks))):
        assert "checkpoints on node node0 is not the same folder on node1, node2" in error
    assert not list(tmp_path.rglob(".seen-*"))


def test_nodes_that_see_different_checkpoints_are_named(run: Path, ranks: Pool, tmp_path: Path) -> None:
    (tmp_path / "disk1").mkdir()
    folders = [str(tmp_path), str(tmp_path / "disk1")]
    for result in ranks.run(2, find_on_own_node, folders, CheckpointConfig(resume="run/step_00000004")):
        assert "node node0 and node1 do not see the same manifest.json" in result.error


def test_files_that_stayed_on_a_nodes_own_disk_are_an_error_that_names_the_node(run: Path, ranks: Pool) -> None:
    """Do not resume from an older checkpoint: the run would lose steps because a folder was not copied."""
    folder = run / "step_00000004"

    def change(manifest: Tree) -> None:
        for number, record in enumerate(manifest["files"]):
            record["node"] = f"node{number}"

    rewrite_manifest(folder, change)
    (folder / "rank_00001.safetensors").unlink()
    for config in (CheckpointConfig(dir=str(run)), CheckpointConfig(resume=str(folder))):
        for result in ranks.run(2, find, config):
            assert result.name is None
            assert "all files of node1 are missing: these nodes wrote to their own disks" in result.error
