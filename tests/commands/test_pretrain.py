"""The pretrain command like a user runs it: wrong inputs give one line, jobs start, and jobs end when a rank dies."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import BIN, ENVIRONMENT, ROOT, config_file, records, run_command
from support.job import free_port

RECORD_KEYS = {
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "step_seconds",
    "data_wait_fraction",
    "tflops_per_device",
    "peak_memory_gib",
    "time",
}
"""Keys of a training record of one process on a CPU."""


def pretrain(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    return run_command(sys.executable, "pretrain_gpt.py", "--config", *arguments, **environment)


def assert_refused(result: "subprocess.CompletedProcess[str]", *words: str) -> None:
    """Assert that there is one error line with these words, no traceback, and exit code 2."""
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "error:" in line]
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr
    assert line


def test_a_missing_config_is_refused() -> None:
    assert_refused(pretrain("nowhere.json"), "nowhere.json", "No such file")


def test_debug_shows_the_traceback_of_an_error() -> None:
    result = pretrain("nowhere.json", "--debug")
    assert result.returncode == 2
    assert "Traceback" in result.stderr and "error: nowhere.json" in result.stderr


def test_an_unknown_key_is_refused_with_the_nearest_valid_key(tmp_path: Path) -> None:
    assert_refused(pretrain(config_file(tmp_path), "--set", "parallel.tensr=2"), "parallel.tensr", "did you mean tensor?")


def test_a_missing_data_file_is_refused_with_a_similar_file(tmp_path: Path) -> None:
    assert_refused(pretrain(config_file(tmp_path, data={"train": str(tmp_path / "corpse")})), "corpse", "corpus")


def test_a_config_without_training_data_is_refused() -> None:
    flat = "tests/fixtures/flat_gpt.json"
    assert_refused(pretrain(flat, "--set", "model.vocab_size=100"), "data.train", "no training data")


def test_a_truncated_data_file_is_refused(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    path = tmp_path / "corpus.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert_refused(pretrain(config), "corpus.bin", "bytes")


def test_data_with_token_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    result = pretrain(config_file(tmp_path, model={"vocab_size": 30}))
    assert_refused(result, "token id 60", "the vocabulary has the ids 0 to 29")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    result = pretrain(config_file(tmp_path, data={"tokenizer": "byte"}))
    assert_refused(result, "model.vocab_size: 61 is below the 257 tokens")


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    result = pretrain(config_file(tmp_path, data={"tokenizer": str(tmp_path / "t.model")}))
    assert_refused(result, "t.model", "no such tokenizer")


def test_an_impossible_layout_is_refused_with_the_world_sizes_that_fit(tmp_path: Path) -> None:
    result = pretrain(config_file(tmp_path, parallel={"tensor": 2}))
    assert_refused(result, "a world of 1 ranks does not fit", "fit: 2, 4")


def test_an_incomplete_launcher_environment_is_refused(tmp_path: Path) -> None:
    assert_refused(pretrain(config_file(tmp_path), RANK="0"), "WORLD_SIZE is not set")


def test_print_config_prints_the_config_of_megagpt_and_of_deepspeed(tmp_path: Path) -> None:
    result = pretrain(config_file(tmp_path), "--print-config", "--set", "zero.stage=2", "--set", "deepspeed.dump_state=true")
    assert result.returncode == 0, result.stderr
    tree = json.loads(result.stdout)
    assert tree["config"]["zero"]["stage"] == tree["deepspeed"]["zero_optimization"]["stage"] == 2
    assert tree["deepspeed"]["dump_state"] is True
    assert tree["deepspeed"]["gradient_clipping"] == 0.05


def test_print_config_refuses_a_pattern_that_matches_no_weight(tmp_path: Path) -> None:
    result = pretrain(config_file(tmp_path, optimizer={"learning_rate_scales": {"embeding.*": 0.5}}), "--print-config")
    assert_refused(result, "optimizer.learning_rate_scales: 'embeding.*' matches no weight", "nearest is 'embedding.*'")


@pytest.fixture(scope="module")
def single_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in one process, without a launcher and without a compiler on the machine."""
    folder = tmp_path_factory.mktemp("single_process")
    (folder / "bin").mkdir()
    result = pretrain(config_file(folder), PATH=str(folder / "bin"), CC="/nowhere/cc", CXX="/nowhere/c++")
    assert result.returncode == 0, result.stderr
    return folder


def test_one_process_trains_without_a_launcher_or_a_compiler(single_process: Path) -> None:
    run = records(single_process)
    assert [record["step"] for record in run] == [1, 2, 3]
    assert all(record.keys() == RECORD_KEYS for record in run)
    assert run[-1]["tokens"] == 3 * 8 * 16
    assert all(record["tflops_per_device"] > 0 and record["peak_memory_gib"] > 0.01 for record in run)


def test_a_run_whose_output_is_on_a_full_disk_trains_to_its_end(tmp_path: Path) -> None:
    command = ["bash", "-c", 'exec "$0" "$@" > /dev/full', sys.executable, "pretrain_gpt.py", "--config", config_file(tmp_path)]
    result = run_command(*command)
    assert result.returncode == 0, result.stderr
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]


@pytest.mark.launch
def test_two_ranks_of_deepspeed_train_like_one_process(single_process: Path, tmp_path: Path) -> None:
    launcher = [BIN / "deepspeed", "--num_gpus", 2, "--master_port", free_port()]
    command = [*launcher, "pretrain_gpt.py", "--config", config_file(tmp_path), "--set", "parallel.pipeline=2"]
    result = run_command(*command, timeout=200, PATH=f"{BIN}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stdout + result.stderr
    losses, expected = ([record["loss"] for record in records(folder)] for folder in (tmp_path, single_process))
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.launch
def test_a_job_of_torchrun_ends_when_a_rank_dies(tmp_path: Path) -> None:
    config = config_file(tmp_path, training={"steps": 1_000_000})
    launcher = [BIN / "torchrun", "--nproc_per_node", 2, "--master_port", free_port()]
    command = [str(word) for word in (*launcher, "pretrain_gpt.py", "--config", config)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, **pipes) as job:
        assert job.stdout is not None
        assert next(line for line in job.stdout if re.search(r"step +2/", line))
        find = ["pgrep", "-P", str(job.pid), "-f", "pretrain_gpt"]
        children = subprocess.run(find, capture_output=True, text=True, check=False).stdout.split()
        assert len(children) == 2
        os.kill(int(children[1]), signal.SIGKILL)
        output, _ = job.communicate(timeout=30)
    assert job.returncode != 0
    assert "another rank has ended" in output or "Signal 9" in output or "SIGKILL" in output
