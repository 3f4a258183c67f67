"""The commands of the SLURM script, with substitutes for `srun` and `scontrol` that start the ranks on this machine."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.commands import LAUNCHER_VARIABLES, ROOT

pytestmark = pytest.mark.launch

SCRIPT = ROOT / "examples" / "slurm" / "pretrain.sbatch"
TASKS = 2

SRUN = f"""#!{sys.executable}
# Like srun: start one process per task, with its rank in the environment; if the option says so, a failed task ends the others.
import os, signal, subprocess, sys
options = [word for word in sys.argv[1:] if word.startswith("--kill")]
command = sys.argv[1 + len(options):]
pids = set()
for rank in range(int(os.environ["SLURM_NTASKS"])):
    variables = {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}}
    pids.add(subprocess.Popen(command, env=os.environ | variables).pid)
worst = 0
while pids:
    pid, status = os.wait()
    pids.discard(pid)
    code = os.waitstatus_to_exitcode(status)
    worst = max(worst, code if code >= 0 else 128 - code)
    if code and "--kill-on-bad-exit=1" in options:
        for other in pids:
            os.kill(other, signal.SIGTERM)
sys.exit(worst)
"""
SCONTROL = """#!/bin/sh
if test "$1" = requeue; then echo "$2" >> "$SLURM_SUBMIT_DIR/requeued"; exit; fi
test "$*" = "show hostnames here,elsewhere" || exit 1
echo 127.0.0.1
echo elsewhere.invalid
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of `TASKS` tasks, with the substitutes first in PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    inherited = {
        key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES and not key.startswith("SLURM_")
    }
    return {
        **inherited,
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "here,elsewhere",
        "SLURM_NTASKS": str(TASKS),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }


def submit(slurm: dict[str, str], folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the commands of the script like a job that was submitted from `folder`."""
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=slurm | {"SLURM_SUBMIT_DIR": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def write_corpus(prefix: Path, vocab_size: int) -> None:
    """Write 40 documents of 100 random uint16 tokens in the Megatron .bin/.idx format, without megagpt."""
    documents, length = 40, 100
    np.random.default_rng(0).integers(vocab_size, size=documents * length, dtype=np.uint16).tofile(f"{prefix}.bin")
    sizes = np.full(documents, length, dtype=np.int32)
    pointers = np.arange(documents, dtype=np.int64) * length * 2
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, documents, documents + 1)
    ends = np.arange(documents + 1, dtype=np.int64)
    Path(f"{prefix}.idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + ends.tobytes())


def test_the_tasks_of_a_job_train_together(slurm: dict[str, str], tmp_path: Path) -> None:
    vocab_size = 64
    write_corpus(tmp_path / "corpus", vocab_size)
    config = {
        "model": {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": vocab_size},
        "parallel": {"tensor": TASKS},
        "data": {"train": str(tmp_path / "corpus")},
        "training": {"steps": 5, "micro_batch_size": 2, "global_batch_size": 4},
        "logging": {"interval": 1, "metrics_file": str(tmp_path / "metrics.jsonl")},
    }
    (tmp_path / "run.json").write_text(json.dumps(config))
    job = submit(slurm, ROOT, str(tmp_path / "run.json"), "--set", "training.steps=2")
    assert job.returncode == 0, job.stdout + job.stderr
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert list(losses) == [1, 2]  # one record per step, from one rank, and the number of steps of --set
    assert losses[1] == pytest.approx(math.log(vocab_size), rel=0.05)  # the loss of an untrained model


def test_every_task_gets_its_rank_the_address_and_the_arguments(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "pretrain_gpt.py").write_text(
        "import json, os, sys\n"
        "names = ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'MASTER_ADDR', 'MASTER_PORT')\n"
        "json.dump([sys.argv[1:], *(os.environ[name] for name in names)], open('task' + os.environ['SLURM_PROCID'], 'w'))\n"
    )
    job = submit(slurm, tmp_path, "my.json", "--set", "data.paths=a b")
    assert job.returncode == 0, job.stderr
    port = str(20000 + os.getpid() % 10000)
    for rank in range(TASKS):
        arguments, *variables = json.loads((tmp_path / f"task{rank}").read_text())
        assert arguments == ["--config", "my.json", "--set", "data.paths=a b"]
        assert variables == [str(rank), str(TASKS), str(rank), "127.0.0.1", port]


def test_a_failed_task_ends_the_job_with_an_error(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "pretrain_gpt.py").write_text(
        "import os, signal, sys\n"
        "sys.exit(3) if os.environ['SLURM_PROCID'] == '1' else signal.pause()\n"  # rank 0 would wait forever
    )
    job = submit(slurm, tmp_path)
    assert job.returncode != 0


def test_a_job_that_reaches_its_time_limit_saves_and_is_requeued_once(slurm: dict[str, str], tmp_path: Path) -> None:
    """The ranks end one after another, and srun sends a signal to the remaining ones: the exit code must still be 75."""
    write_corpus(tmp_path / "corpus", 64)
    config = {
        "model": {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 64},
        "data": {"train": str(tmp_path / "corpus")},
        "training": {"steps": 1_000_000, "max_hours": 1e-6, "micro_batch_size": 2, "global_batch_size": 4},
        "checkpoint": {"dir": str(tmp_path / "checkpoints")},
    }
    (tmp_path / "run.json").write_text(json.dumps(config))
    (tmp_path / "pretrain_gpt.py").symlink_to(ROOT / "pretrain_gpt.py")
    (tmp_path / "megagpt").symlink_to(ROOT / "megagpt")
    job = submit(slurm, tmp_path, "run.json")
    assert job.returncode == 75, job.stdout + job.stderr
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000001\n"
    assert (tmp_path / "requeued").read_text().split() == [slurm["SLURM_JOB_ID"]]


def test_a_job_that_fails_is_not_requeued(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "pretrain_gpt.py").write_text("raise SystemExit(2)\n")
    assert submit(slurm, tmp_path).returncode != 0
    assert not (tmp_path / "requeued").exists()


def test_a_cancelled_job_lets_its_tasks_save_and_is_not_requeued(slurm: dict[str, str], tmp_path: Path) -> None:
    """SLURM signals the tasks and the script. Here the first task signals the script, which must wait for the task."""
    (tmp_path / "pretrain_gpt.py").write_text(
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"  # like a rank that has saved
        "if os.environ['SLURM_PROCID'] == '0':\n"
        "    os.kill(int(os.environ['SCRIPT']), signal.SIGTERM)\n"
        "    time.sleep(0.5)\n"
        "    pathlib.Path('saved').touch()\n"
        "while not pathlib.Path('saved').exists():\n"  # the ranks end together
        "    time.sleep(0.01)\n"
        "raise SystemExit(75)\n"
    )
    wrapper = tmp_path / "wrapper.sh"
    wrapper.write_text(f'export SCRIPT=$$\nexec bash "{SCRIPT}"\n')
    environment = slurm | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    job = subprocess.run(["bash", str(wrapper)], env=environment, capture_output=True, timeout=60, check=False)
    assert job.returncode == 75, job.stderr
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "requeued").exists()
