"""The single-node script passes its arguments to the deepspeed launcher."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import ENVIRONMENT, ROOT

SCRIPT = ROOT / "examples" / "single_node.sh"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the script and a substitute for deepspeed, which writes its arguments and variables to a file."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "single_node.sh").write_text(SCRIPT.read_text())
    launcher = tmp_path / ".venv" / "bin" / "deepspeed"
    launcher.parent.mkdir(parents=True)
    launcher.write_text(
        f'#!{sys.executable}\nimport os, sys\nprint(*sys.argv[1:], os.environ["OMP_NUM_THREADS"], os.getcwd())\n'
    )
    launcher.chmod(0o755)
    return tmp_path


def run_script(clone: Path, folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run the script, called from `folder`."""
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(
        ["bash", str(clone / "examples" / "single_node.sh"), *arguments],
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_the_script_starts_the_launcher_in_the_callers_folder_with_all_arguments(clone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "experiments"
    folder.mkdir()
    result = run_script(clone, folder, "8", "my.json", "--set", "data.paths=a", MASTER_PORT="29511")
    assert result.returncode == 0, result.stderr
    script = clone.resolve() / "pretrain_gpt.py"
    options = f"--num_gpus 8 --master_port 29511 --log_level error {script}"
    assert result.stdout == f"{options} --config my.json --set data.paths=a 1 {folder.resolve()}\n"


def test_the_default_port_is_one_that_is_free(clone: Path) -> None:
    """Two runs on one machine get two ports."""
    words = [run_script(clone, clone, "8", "my.json").stdout.split() for _ in range(2)]
    ports = [int(line[line.index("--master_port") + 1]) for line in words]
    assert all(1024 <= port <= 65535 for port in ports)
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_missing_arguments_print_the_usage(clone: Path) -> None:
    result = run_script(clone, clone, "8")
    assert result.returncode == 2
    assert "usage: bash examples/single_node.sh GPUS CONFIG" in result.stderr
