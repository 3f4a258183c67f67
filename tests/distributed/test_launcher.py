"""Rank and world size are read from the variables of each supported launcher, and incomplete variables are refused."""

import subprocess
import sys

import pytest

from megagpt.distributed.launcher import Launcher, read_launcher
from megagpt.errors import ConfigError

ADDRESS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **ADDRESS}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "4",
    **ADDRESS,
}


def test_without_variables_the_process_runs_alone() -> None:
    assert read_launcher({}) == Launcher(rank=0, world_size=1, local_rank=0, local_size=1)


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN])
def test_torchrun_and_srun_give_the_same_values(variables: dict[str, str]) -> None:
    assert read_launcher(variables) == Launcher(rank=5, world_size=8, local_rank=1, local_size=4)


def test_the_variables_of_torchrun_have_priority_over_those_of_slurm() -> None:
    """torchrun may itself be started by srun, with one task per node."""
    assert read_launcher({**SRUN, **TORCHRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}).rank == 5


def test_a_slurm_job_of_one_task_runs_alone() -> None:
    """For example a shell that salloc opened."""
    assert read_launcher({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == Launcher()


def test_a_shell_in_a_slurm_job_runs_alone() -> None:
    assert read_launcher({"SLURM_NTASKS": "8"}) == Launcher()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "environment: WORLD_SIZE is not set, but the launcher set others"),
        ({"WORLD_SIZE": "2"}, "environment: RANK is not set, but the launcher set others"),
        ({**TORCHRUN, "RANK": "five"}, "environment: RANK is 'five', expected a number"),
        ({**TORCHRUN, "WORLD_SIZE": "-8"}, "environment: WORLD_SIZE is '-8', expected a number"),
        ({**SRUN, "SLURM_LOCALID": ""}, "environment: SLURM_LOCALID is '', expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR is not set: 2 ranks need one address"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is not set: 2 ranks need one address"),
    ],
)
def test_incomplete_or_invalid_variables_are_refused_by_name(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_launcher(variables)
    assert message in str(error.value)


def test_one_rank_of_a_launcher_needs_no_address() -> None:
    assert read_launcher({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) == Launcher()


def test_reading_the_variables_does_not_import_torch() -> None:
    program = "import sys, megagpt.distributed.launcher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
