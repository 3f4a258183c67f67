"""Every kind of layout on one GPU, which its ranks share, trains as one process on the CPU does in fp32; runs resume and write.

Skipped without CUDA; MEGAGPT_GPU_TESTS=cpu runs the same on the CPU. `make test-gpu` runs this folder.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megagpt.data.indexed import IndexedWriter

ROOT = Path(__file__).parents[2]
ON_CPU = os.environ.get("MEGAGPT_GPU_TESTS") == "cpu"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available() and not ON_CPU, reason="needs a GPU")

STEPS = 4
TOLERANCE = 2e-6
"""Relative; losses are about 5. Sums in another order change the last bits of fp32; a wrong layout changes the third digit."""
ENCODER = [
    "model.encoder_layers=2",
    "model.n_layer=2",
    "model.encoder_positions=64",
    "model.n_positions=32",
    "model.vocab_size=400",
    "model.position_embedding=relative",
    "data.task=span_corruption",
    "data.tokenizer=byte",
]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "compiled": (1, ["training.compile=true"]),
    "compiled, dropout, full recompute": (1, ["training.compile=true", "model.resid_pdrop=0.1", "training.recompute=full"]),
    "documents, windows": (1, ["data.reset_attention=true", "model.attention_window=20", "model.full_attention_every=2"]),
    "learned bias, sinks, tensor 2": (
        2,
        ["model.position_embedding=relative", "model.attention_sinks=true", "parallel.tensor=2"],
    ),
    "ALiBi, cap": (1, ["model.position_embedding=alibi", "model.attention_softcap=5.0"]),
    "data 2, ZeRO-1": (2, ["zero.stage=1"]),
    "data 2, ZeRO-2, buckets": (2, ["zero.stage=2", "zero.reduce_bucket_mib=0.01"]),
    "data 2, ZeRO-3": (2, ["zero.stage=3"]),
    "context 2": (2, ["parallel.context=2"]),
    "tensor 2": (2, ["parallel.tensor=2"]),
    "pipeline 2, interleaved": (
        2,
        ["parallel.pipeline=2", "parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=2"],
    ),
    "encoder and decoder, tensor 2 x pipeline 2": (4, ["parallel.tensor=2", "parallel.pipeline=2", *ENCODER]),
    "pipeline 2, zbv, ZeRO-2": (4, ["parallel.pipeline=2", "parallel.schedule=zbv", "zero.stage=2"]),
    "2 x 2 x 2, sequence parallel": (8, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence_parallel=true"]),
}
"""Ranks and overrides."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu")
    with IndexedWriter(path / "random", np.dtype(np.uint16)) as writer:
        writer.add_documents(np.random.default_rng(0).integers(0, 200, 20_000).astype(np.uint16), [50] * 400)
    config: dict[str, Any] = {
        "model": {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_positions": 64, "vocab_size": 200},
        "data": {"train": str(path / "random")},
        "training": {"steps": STEPS, "micro_batch_size": 2, "global_batch_size": 16, "compile": False},
        "optimizer": {"learning_rate": 1e-3},
        "logging": {"interval": 1},
    }
    (path / "run.json").write_text(json.dumps(config))
    return path


def command_of(folder: Path, ranks: int, overrides: list[str]) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*torchrun, str(ROOT / "tests/gpu/one_card.py"), "--config", str(folder / "run.json"), "--set", *overrides]


def environment(on_cpu: bool) -> dict[str, str]:
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return variables | ({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})


def output_of(command: list[str], on_cpu: bool = ON_CPU) -> str:
    """Return the standard output of a command that must succeed."""
    done = subprocess.run(command, env=environment(on_cpu), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(folder: Path, name: str, ranks: int, overrides: list[str], on_cpu: bool = ON_CPU) -> list[float]:
    """Train on `ranks` ranks that share one device, and return the loss of each step."""
    metrics = folder / f"{name}.jsonl"
    output_of(command_of(folder, ranks, [f"logging.metrics_file={metrics}", *overrides]), on_cpu)
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_process_on_the_cpu_does(name: str, folder: Path) -> None:
    ranks, overrides = LAYOUTS[name]
    same_model = [override for override in overrides if override.startswith(("model.", "data."))]
    expected = losses(folder, f"{name} expected", 1, same_model, on_cpu=True)
    assert len(expected) == STEPS
    assert losses(folder, name, ranks, overrides) == pytest.approx(expected, rel=TOLERANCE)


def test_two_runs_of_a_deterministic_run_have_the_same_bits(folder: Path) -> None:
    overrides = ["training.deterministic=true", "training.precision=bf16", "training.compile=true", "model.resid_pdrop=0.1"]
    assert losses(folder, "first", 1, overrides) == losses(folder, "second", 1, overrides)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_low_precision_stays_near_fp32(precision: str, folder: Path) -> None:
    """bf16 and fp8 change the third digit of a loss of about 5, fp16 the fourth."""
    if precision == "fp8" and not ON_CPU and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 needs Hopper or newer")
    if precision == "fp16" and ON_CPU:
        pytest.skip("DeepSpeed has no fp16 on this CPU")
    expected = losses(folder, "fp32", 1, [], on_cpu=True)
    found = losses(folder, precision, 1, [f"training.precision={precision}", "model.resid_pdrop=0.0"])
    assert found == pytest.approx(expected, rel=1e-2) and found != expected


def test_a_checkpoint_of_one_layout_resumes_under_another(folder: Path) -> None:
    save = [f"checkpoint.dir={folder / 'across'}", "training.steps=2", "lr_schedule.decay_steps=4"]
    losses(folder, "half", 2, ["parallel.tensor=2", *save])
    resumed = losses(folder, "rest", 2, ["zero.stage=2", *save, f"training.steps={STEPS}"])
    straight = losses(folder, "straight", 1, ["lr_schedule.decay_steps=4"], on_cpu=True)
    assert resumed == pytest.approx(straight[2:], rel=TOLERANCE)


def test_a_killed_rank_ends_the_job_and_the_next_start_continues(folder: Path) -> None:
    saved = [f"checkpoint.dir={folder / 'killed'}", "checkpoint.interval=2"]
    command = command_of(folder, 2, ["parallel.tensor=2", "training.steps=1000000", *saved])
    with subprocess.Popen(command, env=environment(ON_CPU), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        assert job.stdout is not None
        for line in job.stdout:
            if "saved " in line:
                break
        ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout.split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        job.stdout.read()
    assert job.returncode != 0
    step = int((folder / "killed" / "latest").read_text().removeprefix("step_"))
    again = losses(folder, "again", 1, [*saved, f"training.steps={step + 1}"])
    assert len(again) == 1


def test_a_model_trained_here_writes_the_same_text_on_the_gpu_and_on_the_cpu(folder: Path) -> None:
    checkpoints = folder / "writer"
    losses(folder, "writer", 1, [f"checkpoint.dir={checkpoints}", "data.tokenizer=byte", "model.vocab_size=257"])
    command = [sys.executable, str(ROOT / "tools/generate_text.py"), "--checkpoint", str(checkpoints), "--prompt", "a text"]
    greedy = [*command, "--max-tokens", "30", "--temperature", "0", "--device"]
    assert output_of([*greedy, "cpu" if ON_CPU else "cuda"]) == output_of([*greedy, "cpu"], on_cpu=True)
