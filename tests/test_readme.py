"""Paths, links and commands in the documentation exist and are accepted by the programs that they name."""

import re
import shlex
import subprocess
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

from megagpt.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/launching.md",
    "docs/data.md",
    "docs/schedules.md",
    "docs/communication.md",
    "docs/checkpoints.md",
    "docs/metrics.md",
)
PATH = re.compile(r"(?<![\w./-])((?:\.ci|configs|docs|examples|megagpt|tests|tools)/[\w./-]*|\w[\w-]*\.(?:py|md|txt)|LICENSE)")
LINK = re.compile(r"\]\(([^)#:]+)\)")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def shell_blocks(page: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", read(page), re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Every command of the page's shell blocks, in words."""
    return [shlex.split(line) for block in shell_blocks(page) for line in block.splitlines() if line]


def after(command: list[str], flag: str) -> list[str]:
    """The values that follow `flag`."""
    return [value for word, value in pairwise(command) if word == flag]


@pytest.mark.parametrize("page", PAGES)
def test_every_path_named_exists(page: str) -> None:
    named = PATH.findall(read(page))
    assert len(named) >= 3
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page: str) -> None:
    folder = (ROOT / page).parent
    assert [link for link in LINK.findall(read(page)) if not (folder / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_shell_block_is_valid_bash(page: str) -> None:
    for block in shell_blocks(page):
        result = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
        assert result.returncode == 0, f"{block}\n{result.stderr}"


@pytest.mark.parametrize("page", PAGES[:2])
def test_every_config_in_a_command_loads_with_its_overrides(page: str) -> None:
    runs = [(after(command, "--config"), after(command, "--set")) for command in commands(page)]
    runs += [([word], after(command, "--set")) for command in commands(page) for word in command if word.startswith("configs/")]
    loaded = [load_config(ROOT / config, overrides) for configs, overrides in runs for config in configs]
    assert loaded


@pytest.mark.parametrize("page", PAGES)
def test_every_command_has_arguments_that_its_parser_accepts(page: str) -> None:
    for command in commands(page):
        scripts = [position for position, word in enumerate(command) if word.endswith(".py")]
        if not scripts:
            continue
        name = Path(command[scripts[0]]).stem
        module = import_module(f"megagpt.commands.{'pretrain' if name == 'pretrain_gpt' else name}")
        module.create_parser().parse_args([word for word in command[scripts[0] + 1 :] if not word.startswith(">")])


def test_every_make_target_named_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+)", "\n".join(re.findall(r"`[^`]+`|```.*?```", read("README.md"), re.DOTALL))))
    assert {"quickstart", "test", "setup"} <= named
    assert named <= targets


def test_every_console_script_named_is_installed_by_setup() -> None:
    setup = read("setup.py")
    named = re.findall(r"megagpt-([a-z-]+)", read("README.md"))
    assert len(named) == 11
    assert [name for name in named if f'"{name}"' not in setup] == []


@pytest.mark.parametrize("script", ["examples/single_node.sh", "examples/slurm/pretrain.sbatch", ".ci/run"])
def test_every_shell_script_is_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)
