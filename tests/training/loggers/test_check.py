"""Loggers that cannot be used are refused before the run, in one sentence, and nothing is written."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import Tree, tiny_config

from megagpt.config import to_json
from megagpt.errors import ConfigError
from megagpt.training.loggers.check import check_loggers


def check(path: Path | str, **sections: Tree) -> None:
    logging = {"metrics_file": str(path)} | sections.pop("logging", {})
    check_loggers(tiny_config(logging=logging, **sections))


def test_a_new_file_and_a_file_with_records_are_accepted_and_not_changed(tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    check(tmp_path / "old.jsonl")
    check(tmp_path / "new" / "folder" / "m.jsonl")
    assert (tmp_path / "old.jsonl").read_text() == '{"step": 1}\n{"step": 2, "lo'
    assert [entry.name for entry in tmp_path.iterdir()] == ["old.jsonl"]


def pipe(path: Path) -> None:
    os.mkfifo(path)


NO_REGULAR_FILES: dict[str, Callable[[Path], None]] = {
    "pipe": pipe,
    "link to a pipe": lambda path: (pipe(path.with_name("pipe")), path.symlink_to(path.with_name("pipe")))[0],
    "link to /dev/null": lambda path: path.symlink_to("/dev/null"),
    "link to /dev/full": lambda path: path.symlink_to("/dev/full"),
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("create", NO_REGULAR_FILES.values(), ids=NO_REGULAR_FILES.keys())
def test_devices_and_pipes_are_refused_without_being_opened(tmp_path: Path, create: Callable[[Path], None]) -> None:
    create(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"logging.metrics_file: .*m: is a device or a pipe; .* or leave the key out"):
        check(tmp_path / "m")


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full", "/dev/zero"])
def test_the_devices_themselves_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=rf"logging.metrics_file: {path}: is a device or a pipe"):
        check(path)


def test_a_folder_is_refused_with_a_file_in_it_as_an_example(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder; name a file in it, for example .*/metrics.jsonl"):
        check(tmp_path)


def test_a_file_with_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"model": {"n_layer": 2}}')
    with pytest.raises(ConfigError, match=r"run.json: line 1 is not a JSON record with a step"):
        check(tmp_path / "run.json")


@pytest.mark.parametrize(
    "name", ["step_00000010/m.jsonl", "step_00000010.writing-ab12/m.jsonl", "other/step_00000010/deep/m.jsonl"]
)
def test_a_file_in_a_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is in a checkpoint, whose files must not change"):
        check(tmp_path / name, checkpoint={"dir": str(tmp_path)})


@pytest.mark.parametrize("name", ["latest", "latest.new", "step_00000010", "wandb_run_id", ".lock"])
def test_a_name_that_checkpoints_use_is_refused_in_their_folder_only(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is a name that checkpoints use in checkpoint.dir"):
        check(tmp_path / name, checkpoint={"dir": str(tmp_path)})
    check(tmp_path / name, checkpoint={"dir": str(tmp_path / "checkpoints")})
    check(tmp_path / "metrics.jsonl", checkpoint={"dir": str(tmp_path)})


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"checkpoint": {"dir": "{}/run/checkpoints"}}, "checkpoint.dir"),
        ({"logging": {"wandb": {"dir": "{}/run"}}}, "logging.wandb.dir"),
        ({"logging": {"tensorboard": {"dir": "{}/run/"}}}, "logging.tensorboard.dir"),
        ({"data": {"cache_dir": "{}/link/cache"}}, "data.cache_dir"),
    ],
)
def test_the_name_of_a_folder_that_the_run_creates_is_refused(tmp_path: Path, sections: Tree, key: str) -> None:
    """Also through a symbolic link."""

    def filled(tree: Tree) -> Tree:
        return {k: filled(v) if isinstance(v, dict) else v.format(tmp_path) for k, v in tree.items()}

    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"run: must be a folder because of {key}"):
        check(tmp_path / "run", **filled(sections))


def test_the_file_that_standard_output_goes_to_is_refused(tmp_path: Path) -> None:
    code = (
        "import json, sys\n"
        "from megagpt.config import build_config\n"
        "from megagpt.training.loggers.check import check_loggers\n"
        "check_loggers(build_config(json.loads(sys.argv[1])))"
    )
    for name, refused in (("log.txt", True), ("other.txt", False)):
        config = to_json(tiny_config(logging={"metrics_file": str(tmp_path / name)}))
        with (tmp_path / "log.txt").open("w") as log:
            command = [sys.executable, "-c", code, config]
            result = subprocess.run(command, stdout=log, stderr=subprocess.PIPE, text=True, check=False)
        assert (result.returncode != 0) == refused, result.stderr
        assert ("log.txt: is the file that standard output goes to" in result.stderr) == refused


@pytest.mark.parametrize(
    ("logging", "message"),
    [
        ({"wandb": {"project": "x"}}, r"logging.wandb.project: needs the wandb package; install it \(pip install wandb\)"),
        ({"tensorboard": {"dir": "tb"}}, r"logging.tensorboard.dir: needs the tensorboard package; install it"),
    ],
)
def test_a_missing_package_is_named(logging: Tree, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_loggers(tiny_config(logging=logging))
    for name in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=message):
        check_loggers(tiny_config(logging=logging))


def test_a_folder_with_logs_does_not_count_as_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B writes to ./wandb, so a run started in that folder without the package must not find the logs instead."""
    (tmp_path / "tensorboard").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    with pytest.raises(ConfigError, match=r"needs the tensorboard package"):
        check_loggers(tiny_config(logging={"tensorboard": {"dir": "tb"}}))


def test_the_check_does_not_import_torch() -> None:
    code = "import sys; import megagpt.training.loggers.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
