"""The pretrain command as a user meets it: wrong inputs in one line, jobs that start, and jobs that end when a rank dies."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import Tree, corpus, tiny_config

from megagpt.config import to_json

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def config_file(folder: Path, **sections: Tree) -> Path:
    """A config of three steps over a small corpus in `folder`."""
    tree = json.loads(to_json(tiny_config(data={"train": corpus(folder)}, training={"steps": 3, "global_batch_size": 8})))
    tree["logging"] |= {"interval": 1, "metrics_file": str(folder / "metrics.jsonl")}
    for section, keys in sections.items():
        tree[section] |= keys
    path = folder / "run.json"
    path.write_text(json.dumps(tree))
    return path


def pretrain(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "pretrain_gpt.py", "--config", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=120)


def refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """One error line with these words, no traceback, exit code 2."""
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "error:" in line]
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr
    assert line


def test_missing_config() -> None:
    refused(pretrain("nowhere.json"), "nowhere.json", "No such file")


def test_bad_key_names_the_nearest(tmp_path: Path) -> None:
    refused(pretrain(config_file(tmp_path), "--set", "parallel.tensr=2"), "parallel.tensr", "did you mean tensor?")


def test_missing_data_file(tmp_path: Path) -> None:
    refused(pretrain(config_file(tmp_path, data={"train": str(tmp_path / "corpse")})), "corpse", "corpus")


def test_empty_dataset_path_of_a_flat_file() -> None:
    refused(pretrain("tests/fixtures/flat_gpt.json", "--set", "model.vocab_size=100"), "data.train", "no training data")


def test_truncated_bin(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    path = tmp_path / "corpus.bin"
    path.write_bytes(path.read_bytes()[:-2])
    refused(pretrain(config), "corpus.bin", "bytes")


def test_data_of_another_tokenizer(tmp_path: Path) -> None:
    refused(pretrain(config_file(tmp_path, model={"vocab_size": 30})), "token id 60", "the vocabulary has the ids 0 to 29")


def test_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    refused(pretrain(config_file(tmp_path, data={"tokenizer": "byte"})), "model.vocab_size: 61 is below the 257 tokens")


def test_missing_tokenizer(tmp_path: Path) -> None:
    refused(pretrain(config_file(tmp_path, data={"tokenizer": str(tmp_path / "t.model")})), "t.model", "no such tokenizer")


def test_impossible_layout_says_which_would_fit(tmp_path: Path) -> None:
    refused(pretrain(config_file(tmp_path, parallel={"tensor": 2})), "a world of 1 ranks does not fit", "fit: 2, 4, 8")


def test_half_set_environment(tmp_path: Path) -> None:
    refused(pretrain(config_file(tmp_path), RANK="0"), "WORLD_SIZE is not set")


def test_print_config_shows_both_trees(tmp_path: Path) -> None:
    result = pretrain(config_file(tmp_path), "--print-config", "--set", "zero.stage=2", "--set", "deepspeed.dump_state=true")
    assert result.returncode == 0, result.stderr
    tree = json.loads(result.stdout)
    assert tree["config"]["zero"]["stage"] == tree["deepspeed"]["zero_optimization"]["stage"] == 2
    assert tree["deepspeed"]["dump_state"] is True
    assert tree["deepspeed"]["gradient_clipping"] == 0.05


def test_one_process_trains_without_a_launcher_or_a_compiler(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    result = pretrain(config_file(tmp_path), PATH=str(empty), CC="/nowhere/cc", CXX="/nowhere/c++")
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    keys = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "data_wait"}
    assert all(record.keys() == keys for record in records)
    assert records[-1]["tokens"] == 3 * 8 * 16


@pytest.mark.launch
def test_deepspeed_trains_as_one_process_does(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    assert pretrain(config).returncode == 0
    alone = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (tmp_path / "metrics.jsonl").unlink()
    command = [BIN / "deepspeed", "--num_gpus", "2", "--master_port", "29611", "pretrain_gpt.py", "--config", config]
    result = subprocess.run(
        [*map(str, command), "--set", "parallel.pipeline=2"],
        cwd=ROOT,
        env=ENVIRONMENT | {"PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(alone, rel=1e-5)


@pytest.mark.launch
def test_a_rank_that_dies_mid_run_ends_the_job(tmp_path: Path) -> None:
    config = config_file(tmp_path, training={"steps": 1_000_000})
    command = [
        str(BIN / "torchrun"),
        "--nproc_per_node",
        "2",
        "--master_port",
        "29612",
        "pretrain_gpt.py",
        "--config",
        str(config),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, **pipes) as job:
        assert job.stdout is not None
        seen = next(line for line in job.stdout if re.search(r"step +2/", line))
        assert seen
        find = ["pgrep", "-P", str(job.pid), "-f", "pretrain_gpt"]
        children = subprocess.run(find, capture_output=True, text=True).stdout.split()
        assert len(children) == 2
        os.kill(int(children[1]), signal.SIGKILL)
        output, _ = job.communicate(timeout=30)
    assert job.returncode != 0
    assert "another rank has ended" in output or "Signal 9" in output or "SIGKILL" in output
