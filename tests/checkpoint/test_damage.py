"""Nothing trusted: damage is found before training, named, and never loaded; no code is run from any file."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoint.test_resume import config_of
from support.pool import Pool
from support.runs import Tree, corpus, open_trainer, run_trainer

from megagpt.checkpoint import shared
from megagpt.config.schema import CheckpointConfig
from megagpt.errors import CheckpointError
from megagpt.training import resume


@pytest.fixture(scope="module")
def saved(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2 and 4, by two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoint: Tree = {"checkpoint": {"dir": str(folder / "checkpoints"), "interval": 2}}
    ranks.run(2, run_trainer, config_of(folder, corpus(folder), {"tensor": 2}, 1, 4, **checkpoint))
    return folder / "checkpoints"


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def find(config: CheckpointConfig, node: str | None = None) -> tuple[str | None, str, str]:
    """Name of the checkpoint that a run would go on from, what is warned of on rank 0, and the error instead."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), mock.patch.object(shared, "PATIENCE", 0.3):
        try:
            folder = resume.find(config)
        except CheckpointError as error:
            return None, said.getvalue(), str(error)
    return folder.name if folder else None, said.getvalue(), ""


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def plant(path: Path) -> None:
    path.write_bytes(b"not ours")


def take_from_older(path: Path) -> None:
    shutil.copy(path.parent.parent / "step_00000002" / path.name, path)


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated": ("rank_00001.safetensors", truncate, r"rank_00001.safetensors: \d+ bytes, expected \d+"),
    "longer": ("rank_00001.safetensors", grow, r"rank_00001.safetensors: \d+ bytes, expected \d+"),
    "a flipped bit": ("rank_00000.safetensors", flip_a_bit, "rank_00000.safetensors: its SHA-256 is not the manifest's"),
    "missing": ("rank_00001.safetensors", Path.unlink, "rank_00001.safetensors: missing; node .+ wrote it"),
    "of another checkpoint": ("rank_00000.safetensors", take_from_older, "rank_00000.safetensors: its SHA-256"),
    "foreign": ("rank_00007.safetensors", plant, "rank_00007.safetensors: not a file of this checkpoint"),
    "no manifest": ("manifest.json", Path.unlink, "manifest.json: No such file"),
    "an empty manifest": ("manifest.json", lambda path: path.write_bytes(b""), "manifest.json: its SHA-256"),
    "a flipped bit in the manifest": ("manifest.json", flip_a_bit, "manifest.json: its SHA-256"),
    "no checksum of the manifest": ("manifest.sha256", Path.unlink, "manifest.sha256: No such file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_run_goes_on_from_the_newest_whole_one(name: str, run: Path, ranks: Pool) -> None:
    file, damage, said = DAMAGE[name]
    damage(run / "step_00000004" / file)
    for found, warned, error in ranks.run(2, find, CheckpointConfig(dir=str(run)))[:1]:
        assert (found, error) == ("step_00000002", "")
        assert warned.count("going on from") == 1
        assert re.search(said, warned), warned


@pytest.mark.parametrize("name", DAMAGE)
def test_a_checkpoint_that_was_asked_for_by_name_is_never_replaced_by_another(name: str, run: Path, ranks: Pool) -> None:
    file, damage, said = DAMAGE[name]
    damage(run / "step_00000004" / file)
    for found, _, error in ranks.run(2, find, CheckpointConfig(resume=str(run / "step_00000004"))):
        assert found is None
        assert re.search(said, error), error


def test_a_whole_run_goes_on_from_its_newest_without_a_word(run: Path, ranks: Pool) -> None:
    assert ranks.run(2, find, CheckpointConfig(dir=str(run)))[0] == ("step_00000004", "", "")


def test_hidden_files_of_the_file_system_are_no_damage(run: Path, ranks: Pool) -> None:
    (run / "step_00000004" / ".nfs0001").write_bytes(b"x")
    assert ranks.run(2, find, CheckpointConfig(dir=str(run)))[0] == ("step_00000004", "", "")


@pytest.mark.parametrize("text", ["step_00000009", "../../etc", "", "step_00000004/../step_00000002"])
def test_latest_that_points_at_nothing(text: str, run: Path, ranks: Pool) -> None:
    (run / "latest").write_text(text)
    found, warned, error = ranks.run(2, find, CheckpointConfig(dir=str(run)))[0]
    assert (found, error) == ("step_00000004", "")
    assert f"latest: names {text!r}, which is no checkpoint here" in warned


def test_latest_may_be_set_back_by_hand(run: Path, ranks: Pool) -> None:
    (run / "latest").write_text("step_00000002\n")
    assert ranks.run(2, find, CheckpointConfig(dir=str(run)))[0][0] == "step_00000002"


def test_a_half_renamed_folder_is_named_and_removed(run: Path, ranks: Pool) -> None:
    (run / "step_00000004").rename(run / "step_00000004.writing-0a1b2c3d")
    found, warned, _ = ranks.run(2, find, CheckpointConfig(dir=str(run)))[0]
    assert found == "step_00000002"
    assert "step_00000004.writing-0a1b2c3d: a save or deletion that was cut short; removed" in warned
    assert "latest: names 'step_00000004'" in warned
    assert not list(run.glob("*writing*"))


def test_where_no_checkpoint_is_whole_the_run_does_not_begin_anew(run: Path, ranks: Pool) -> None:
    truncate(run / "step_00000002" / "rank_00000.safetensors")
    (run / "step_00000004" / "manifest.json").unlink()
    _, _, error = ranks.run(2, find, CheckpointConfig(dir=str(run)))[1]
    assert "no checkpoint is whole" in error
    assert "step_00000004/manifest.json: No such file" in error and "step_00000002/rank_00000.safetensors:" in error


def test_a_run_that_begins_anew_does_not_write_over_another(run: Path, ranks: Pool) -> None:
    _, _, error = ranks.run(2, find, CheckpointConfig(dir=str(run), resume="never"))[0]
    assert 'checkpoint.resume: "never", but checkpoint.dir' in error and "step_00000004 the newest" in error


@pytest.mark.parametrize("path", ["nowhere", "run"])
def test_a_path_without_a_checkpoint(path: str, ranks: Pool, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    _, _, error = ranks.run(2, find, CheckpointConfig(resume=str(tmp_path / path)))[1]
    assert f"{tmp_path / path}: no checkpoint here" in error


class Evil:
    """What a pickle of this does when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def seal(folder: Path, file: str) -> None:
    """Make the manifest say that a file is as it should be, as one who plants it would."""
    path, content = folder / "manifest.json", (folder / file).read_bytes()
    if file != "manifest.json":
        tree = json.loads(path.read_text())
        record = next(record for record in tree["files"] if record["name"] == file)
        record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        path.write_text(json.dumps(tree))
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  manifest.json\n")


@pytest.mark.parametrize("protocol", ["pickle", "torch.save"])
@pytest.mark.parametrize("file", ["manifest.json", "rank_00000.safetensors", "latest"])
def test_a_malicious_pickle_is_refused_and_not_run(file: str, protocol: str, run: Path, ranks: Pool, tmp_path: Path) -> None:
    """Checksums agree with it, so that they are not what saves us."""
    folder, victim = run / "step_00000004", tmp_path / "executed"
    path = run / file if file == "latest" else folder / file
    if protocol == "pickle":
        path.write_bytes(pickle.dumps(Evil(victim)))
    else:
        torch.save(Evil(victim), path)
    if file != "latest":
        seal(folder, file)
    before = {"checkpoint": {"dir": str(run)}}
    data = str(corpus(tmp_path))
    results = ranks.run(2, outcome, config_of(tmp_path, data, {"tensor": 2}, 1, 4, **before))
    if file == "rank_00000.safetensors":  # found when it is opened
        assert all("rank_00000.safetensors: cannot be read" in result for result in results)
    else:
        assert results[0] == ("step 4" if file == "latest" else "step 2")
    assert not victim.exists()


def outcome(config: Any) -> str:
    """Where a trainer begins, or its error."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            trainer = open_trainer(config)
        except CheckpointError as error:
            return str(error)
    step = trainer.step
    trainer.close()
    return f"step {step}"


def test_a_manifest_cannot_name_a_file_elsewhere(run: Path, ranks: Pool) -> None:
    folder = run / "step_00000004"
    tree = json.loads((folder / "manifest.json").read_text())
    tree["files"][0]["name"] = "../step_00000002/rank_00000.safetensors"
    (folder / "manifest.json").write_text(json.dumps(tree))
    seal(folder, "manifest.json")
    _, _, error = ranks.run(2, find, CheckpointConfig(resume=str(folder)))[0]
    assert "not a megagpt-checkpoint of version 2: files.0.name" in error


def as_nodes(folders: list[str], config: CheckpointConfig) -> tuple[str | None, str, str]:
    """`find`, each rank on a node of its own whose working directory is its own disk."""
    import torch.distributed as dist

    rank, here = dist.get_rank(), Path.cwd()
    os.chdir(folders[rank])
    try:
        with mock.patch.object(socket, "gethostname", lambda: f"node{rank}"):
            return find(config)
    finally:
        os.chdir(here)


def test_nodes_that_write_to_their_own_disks_are_named_before_the_first_step(ranks: Pool, tmp_path: Path) -> None:
    disks = [tmp_path / f"disk{rank}" for rank in range(3)]
    for disk in disks:
        disk.mkdir()
    answers = ranks.run(3, as_nodes, list(map(str, disks)), CheckpointConfig(dir="checkpoints"))
    for _, _, error in answers:
        assert "checkpoints on node node0 is not the same folder on node1, node2" in error
    assert not list(tmp_path.rglob(".seen-*"))


def test_nodes_that_see_other_checkpoints_are_named(run: Path, ranks: Pool, tmp_path: Path) -> None:
    (tmp_path / "disk1").mkdir()
    folders = [str(tmp_path), str(tmp_path / "disk1")]
    for _, _, error in ranks.run(2, as_nodes, folders, CheckpointConfig(resume="run/step_00000004")):
        assert "node node0 and node1 do not see the same manifest.json" in error


def test_files_that_stayed_on_a_nodes_own_disk_are_an_error_that_names_the_node(run: Path, ranks: Pool) -> None:
    """Never a resumption from an older checkpoint: the run would lose steps because of a folder that was not copied."""
    folder = run / "step_00000004"
    tree = json.loads((folder / "manifest.json").read_text())
    for number, record in enumerate(tree["files"]):
        record["node"] = f"node{number}"
    (folder / "manifest.json").write_text(json.dumps(tree))
    seal(folder, "manifest.json")
    (folder / "rank_00001.safetensors").unlink()
    for config in (CheckpointConfig(dir=str(run)), CheckpointConfig(resume=str(folder))):
        for found, _, error in ranks.run(2, find, config):
            assert found is None
            assert "all files of node1 are missing: these nodes wrote to their own disks" in error
