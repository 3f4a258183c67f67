"""Paths and links in the documentation exist; tests/test_documented_commands.py executes its commands."""

import re
import subprocess
from pathlib import Path

import pytest

from megagpt.config import data_parallel_size, load_config
from megagpt.config.find import shipped_configs
from megagpt.planner.dry_run_memory import largest_rank_memory
from megagpt.planner.memory import peak_memory
from megagpt.planner.parameters import parameter_count
from megagpt.planner.strategy import Strategy

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md") if page.name != "config.md"))
PATH = re.compile(r"(?<![\w./-])((?:\.ci|configs|docs|examples|megagpt|tests|tools)/[\w./-]*|\w[\w-]*\.(?:py|md|txt)|LICENSE)")
LINK = re.compile(r"\]\(([^)#:]+)\)")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def shell_blocks(page: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", read(page), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_every_path_named_exists(page: str) -> None:
    named = PATH.findall(re.sub(r"```console.*?```", "", read(page), flags=re.DOTALL))  # sessions have a user's files
    assert len(named) >= 3
    folder = (ROOT / page).parent
    assert [path for path in named if not (ROOT / path).exists() and not (folder / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page: str) -> None:
    folder = (ROOT / page).parent
    assert [link for link in LINK.findall(read(page)) if not (folder / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_shell_block_is_valid_bash(page: str) -> None:
    for block in shell_blocks(page):
        result = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
        assert result.returncode == 0, f"{block}\n{result.stderr}"


def test_every_make_target_named_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+)", "\n".join(re.findall(r"`[^`]+`|```.*?```", read("README.md"), re.DOTALL))))
    assert {"quickstart", "test", "setup"} <= named
    assert named <= targets


def test_every_console_script_named_is_installed_by_setup() -> None:
    setup = read("setup.py")
    named = re.findall(r"megagpt-([a-z0-9-]+)", read("README.md"))
    assert len(named) >= 12
    assert [name for name in named if f'"{name}"' not in setup] == []


@pytest.mark.parametrize("script", ["examples/single_node.sh", "examples/slurm/pretrain.sbatch", ".ci/run"])
def test_every_shell_script_is_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_the_index_of_the_docs_links_all_pages() -> None:
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(LINK.findall(read("docs/README.md")))


def table_of_configs() -> dict[str, list[str]]:
    """Return the rows of README's table of configs: name -> parameters, GPUs, layout, memory."""
    rows = re.findall(r"^\| `configs/(.*)\.json` \| (.*) \| (.*) \| (.*) \| (.*) \|$", read("README.md"), re.MULTILINE)
    return {name: cells for name, *cells in rows}


def test_the_table_of_configs_has_all_of_them_with_their_parameters_and_layouts() -> None:
    assert table_of_configs().keys() == shipped_configs().keys() - {"quickstart", "quickstart_t5"}
    for name, (parameters, gpus, layout, _) in table_of_configs().items():
        config = load_config(name)
        parallel = config.parallel
        count = parameter_count(config) / 1e9
        assert parameters == (f"{count:.2f}B" if count < 1 else f"{count:.1f}B" if count < 20 else f"{count:.0f}B"), name
        ranks = int(gpus.replace(",", ""))
        data = data_parallel_size(config, ranks)
        sizes = [("tensor", parallel.tensor), ("pipeline", parallel.pipeline), ("data", data)]
        assert layout == ", ".join(f"{axis} {size}" for axis, size in sizes if size > 1), name


def test_the_memory_in_the_table_of_configs_is_the_planners_prediction() -> None:
    for name, (_, gpus, _, memory) in table_of_configs().items():
        config = load_config(name)
        predict = largest_rank_memory if config.model.encoder_layers else peak_memory
        strategy = Strategy.of(config, int(gpus.replace(",", "")))
        assert memory == f"{predict(config, strategy).total / 2**30:.0f} GiB", name
