"""The launchers above a rank are found by their command lines, and their end is noticed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.distributed.launcher_processes import ENDED, LauncherProcess, has_ended, is_launcher, launchers_above

RUNNER = ["/venv/bin/python", "/venv/bin/deepspeed", "--num_gpus", "2", "pretrain_gpt.py"]
LAUNCH = ["/venv/bin/python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30=", "pretrain_gpt.py"]


def process_folder(folder: Path, *processes: tuple[int, int, list[str]]) -> Path:
    """Write the files of Linux's /proc for processes, given as pid, parent and command; each started at time 10 x pid."""
    for pid, parent, command in processes:
        (folder / str(pid)).mkdir(parents=True)
        fields = ["S", str(parent), *["0"] * 17, str(10 * pid), "0"]
        (folder / str(pid) / "stat").write_text(f"{pid} (a name) with brackets) {' '.join(fields)}")
        (folder / str(pid) / "cmdline").write_bytes("".join(f"{word}\0" for word in command).encode())
    return folder


@pytest.mark.parametrize(
    "command",
    [
        RUNNER,
        LAUNCH,
        ["python3.11", "-X", "utf8", "/venv/bin/torchrun", "--nproc_per_node", "2"],
        ["/usr/bin/python", "-m", "torch.distributed.run", "pretrain_gpt.py"],
        ["mpirun", "-n", "2", "python", "pretrain_gpt.py"],
        ["/opt/mpich/bin/hydra_pmi_proxy", "--control-port", "a:1"],
        ["slurmstepd: [123.0]"],
        ["srun", "python"],
    ],
)
def test_launchers_are_recognised(command: list[str]) -> None:
    assert is_launcher(command)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["bash", "deepspeed"],
        ["nohup", "torchrun"],
        ["python", "pretrain_gpt.py", "torchrun"],
        ["python", "-m", "megagpt", "deepspeed"],
        ["python", "-c", "torchrun"],
        ["sshd"],
    ],
)
def test_shells_and_scripts_are_no_launchers(command: list[str]) -> None:
    assert not is_launcher(command)


def test_all_launchers_above_a_rank_are_found_the_nearest_first(tmp_path: Path) -> None:
    proc = process_folder(
        tmp_path,
        (1, 0, ["/sbin/init"]),
        (20, 1, ["bash"]),
        (30, 20, RUNNER),
        (40, 30, LAUNCH),
        (50, 40, ["python", "pretrain_gpt.py"]),
    )
    assert launchers_above(50, proc) == [LauncherProcess(40, 400), LauncherProcess(30, 300)]
    assert launchers_above(30, proc) == []


@pytest.mark.parametrize(
    ("first", "launch", "ended"),
    [
        (["/sbin/init"], LAUNCH, True),
        (["bash", "-c", "deepspeed ..."], LAUNCH, True),
        (["/sbin/init"], [*LAUNCH, "--node_rank=1"], False),  # pdsh starts it through ssh
        (RUNNER, LAUNCH, False),  # the entry point of a container
        (["/sbin/init"], ["python", "-m", "torch.distributed.run"], False),  # a shell that ended has started it
    ],
)
def test_a_deepspeed_that_ended_before_its_ranks_started_is_noticed(
    first: list[str], launch: list[str], ended: bool, tmp_path: Path
) -> None:
    proc = process_folder(tmp_path, (1, 0, first), (40, 1, launch), (50, 40, ["python", "pretrain_gpt.py"]))
    assert (ENDED in launchers_above(50, proc)) is ended
    assert has_ended(ENDED, proc)


def test_without_a_process_folder_there_is_no_launcher(tmp_path: Path) -> None:
    assert launchers_above(os.getpid(), tmp_path / "none") == []


def test_the_end_of_a_process_is_noticed_before_its_parent_has_waited_for_it() -> None:
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        status = (Path("/proc") / str(process.pid) / "stat").read_text()
        launcher = LauncherProcess(process.pid, int(status.rpartition(")")[2].split()[19]))
        assert not has_ended(launcher)
        assert has_ended(LauncherProcess(process.pid, launcher.start_time - 1))  # another process has the number now
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie
        assert has_ended(launcher)
    assert has_ended(launcher)
