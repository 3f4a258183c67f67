"""The single-node script passes its arguments to the deepspeed launcher."""

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


def run_script(clone: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(
        ["bash", str(clone / "examples" / "single_node.sh"), *arguments],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_the_script_starts_the_launcher_in_the_clone_with_all_arguments(clone: Path) -> None:
    result = run_script(clone, "8", "my.json", "--set", "data.paths=a")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"--num_gpus 8 pretrain_gpt.py --config my.json --set data.paths=a 1 {clone.resolve()}\n"


def test_missing_arguments_print_the_usage(clone: Path) -> None:
    result = run_script(clone, "8")
    assert result.returncode == 2
    assert "usage: bash examples/single_node.sh GPUS CONFIG" in result.stderr
