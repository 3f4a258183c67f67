"""Rank and world size are read from the variables of each supported launcher, and incomplete variables are refused."""

import subprocess
import sys

import pytest

from megagpt.distributed.launcher import Launcher, read_launcher
from megagpt.errors import ConfigError

ADDRESS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_RANK": "5",
}
JSRUN = {
    "JSM_NAMESPACE_RANK": "5",
    "JSM_NAMESPACE_SIZE": "8",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "4",
    "PMIX_RANK": "5",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
"""Also Intel MPI."""


def test_without_variables_the_process_runs_alone() -> None:
    assert read_launcher({}) == Launcher(rank=0, world_size=1, local_rank=0, local_size=1)


def place(variables: dict[str, str]) -> tuple[int, int, int, int]:
    """Return rank, world size, local rank and local size."""
    launcher = read_launcher(variables)
    return launcher.rank, launcher.world_size, launcher.local_rank, launcher.local_size


@pytest.mark.parametrize("variables", [TORCHRUN, DEEPSPEED, SRUN, OPEN_MPI, JSRUN, MPICH])
def test_every_launcher_gives_the_same_values(variables: dict[str, str]) -> None:
    assert place({**variables, **ADDRESS}) == (5, 8, 1, 4)
    launcher = read_launcher({**variables, **ADDRESS})
    assert (launcher.address, launcher.port) == ("10.0.0.1", 29501)
    assert launcher.port_option == ("--master_port" if "RANK" in variables else "MASTER_PORT")


@pytest.mark.parametrize("outer", [SRUN, OPEN_MPI, MPICH])
def test_the_variables_of_torchrun_have_priority(outer: dict[str, str]) -> None:
    """torchrun may itself be started by srun or mpirun, with one process per node."""
    one_per_node = {name: "0" if name.endswith(("RANK", "RANKID", "ID")) else "2" for name in outer}
    assert place({**one_per_node, **TORCHRUN, **ADDRESS}) == (5, 8, 1, 4)


@pytest.mark.parametrize("inner", [OPEN_MPI, MPICH])
def test_the_variables_of_mpi_have_priority_over_those_of_slurm(inner: dict[str, str]) -> None:
    """mpirun starts one process per node with srun, whose variables the ranks inherit."""
    daemon = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    assert place({**daemon, **inner, **ADDRESS}) == (5, 8, 1, 4)


def test_srun_with_pmi2_gives_the_rank_on_the_node_by_its_own_variable() -> None:
    assert place({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8", **ADDRESS}) == (5, 8, 1, 4)


def test_srun_with_pmix_needs_no_variable_of_mpi() -> None:
    assert place({**SRUN, "PMIX_RANK": "5", **ADDRESS}) == (5, 8, 1, 4)


@pytest.mark.parametrize(
    "variables",
    [
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_LOCAL_SIZE": "6"},
        {**MPICH, "PMI_SIZE": "6", "MPI_LOCALNRANKS": "6"},
        {**SRUN, "SLURM_NNODES": "1"},
        {**SRUN, "SLURM_NTASKS_PER_NODE": "8"},
    ],
)
def test_ranks_of_one_node_need_no_address(variables: dict[str, str]) -> None:
    launcher = read_launcher(variables)
    assert (launcher.rank, launcher.address, launcher.port) == (5, "127.0.0.1", 29500)


def test_torchrun_says_that_it_hosts_the_store_and_how_often_it_has_restarted_the_ranks() -> None:
    elastic = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    launcher = read_launcher({**TORCHRUN, **ADDRESS, **elastic})
    assert (launcher.hosts_store, launcher.attempt) == (True, 2)
    launcher = read_launcher({**DEEPSPEED, **ADDRESS})
    assert (launcher.hosts_store, launcher.attempt) == (False, 0)


@pytest.mark.parametrize("outer", [OPEN_MPI, MPICH, {**SRUN, "SLURM_STEP_NUM_TASKS": "8"}])
def test_many_processes_with_the_variables_of_a_lone_rank_are_refused(outer: dict[str, str]) -> None:
    """They would all train alone. A launcher that each of them has started may be meant so."""
    lone = {"RANK": "0", "WORLD_SIZE": "1"}
    with pytest.raises(ConfigError, match="WORLD_SIZE is 1, but .* has started more than one process .*; unset RANK and"):
        read_launcher({**outer, **lone})
    for mark in ("TORCHELASTIC_RUN_ID", "CROSS_RANK"):
        assert read_launcher({**outer, **lone, mark: "0"}).world_size == 1


def test_a_slurm_job_of_one_task_runs_alone() -> None:
    """For example a shell that salloc opened."""
    assert read_launcher({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == Launcher()


def test_a_shell_in_a_slurm_job_runs_alone() -> None:
    assert read_launcher({"SLURM_NTASKS": "8"}) == Launcher()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "environment: WORLD_SIZE is not set, but RANK is"),
        ({"WORLD_SIZE": "2"}, "environment: RANK is not set, but WORLD_SIZE is"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "environment: OMPI_COMM_WORLD_SIZE is not set, but OMPI_COMM_WORLD_RANK is"),
        ({"PMI_RANK": "1"}, "environment: PMI_SIZE is not set, but PMI_RANK is"),
        ({"PMI_RANK": "1", "SLURM_PROCID": "1"}, "environment: PMI_SIZE is not set, but PMI_RANK is"),
        ({"PMIX_RANK": "1"}, "environment: PMIX_RANK is '1', but no variable gives the number of ranks"),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", **ADDRESS},
            "environment: MPI_LOCALRANKID is not set, but PMI_RANK is; set LOCAL_RANK",
        ),
        ({**TORCHRUN, "RANK": "five"}, "environment: RANK is 'five', expected a number"),
        ({**TORCHRUN, "RANK": "9" * 5000}, "expected a number"),
        ({**TORCHRUN, "RANK": "8"}, "environment: RANK is 8, but WORLD_SIZE is 8: expected 0 to 7"),
        ({**TORCHRUN, "WORLD_SIZE": "-8"}, "environment: WORLD_SIZE is '-8', expected a number"),
        ({**TORCHRUN, "WORLD_SIZE": ""}, "environment: WORLD_SIZE is '', expected a number"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "environment: WORLD_SIZE is 0, expected at least 1"),
        ({**SRUN, "SLURM_LOCALID": ""}, "environment: SLURM_LOCALID is '', expected a number"),
        ({**SRUN, "SLURM_NTASKS": ""}, "environment: SLURM_NTASKS is '', expected a number"),
        ({**OPEN_MPI, **ADDRESS, "OMPI_COMM_WORLD_SIZE": "2.0"}, "OMPI_COMM_WORLD_SIZE is '2.0', expected a number"),
        ({**TORCHRUN, "MASTER_PORT": "1"}, "MASTER_ADDR is not set: 8 ranks need one address"),
        ({**TORCHRUN, "MASTER_ADDR": "a"}, "MASTER_PORT is not set: 8 ranks need one address"),
        ({**OPEN_MPI}, "MASTER_ADDR is not set: 8 ranks need one address"),
        ({**TORCHRUN, **ADDRESS, "MASTER_ADDR": " "}, "MASTER_ADDR is ' ', expected the host name of rank 0"),
        *(
            ({**TORCHRUN, **ADDRESS, "MASTER_PORT": port}, f"MASTER_PORT is '{port}', expected a port from 1 to 65535")
            for port in ("abc", "99999", "", "0", "-1")
        ),
    ],
)
def test_incomplete_or_invalid_variables_are_refused_by_name(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_launcher(variables)
    assert message in str(error.value)


def test_one_rank_of_a_launcher_needs_no_address() -> None:
    assert place({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "abc"}) == (0, 1, 0, 1)


def test_reading_the_variables_does_not_import_torch() -> None:
    program = "import sys, megagpt.distributed.launcher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
