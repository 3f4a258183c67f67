"""Every kind of layout on one GPU, whose ranks share it, trains as one process on the CPU does in fp32.

Skipped without CUDA; MEGAGPT_GPU_TESTS=cpu runs the same on the CPU. `make test-gpu` runs this folder.
"""

import json
import os
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
    "data 2, ZeRO-2": (2, ["zero.stage=2"]),
    "data 2, ZeRO-3": (2, ["zero.stage=3"]),
    "context 2": (2, ["parallel.context=2"]),
    "tensor 2": (2, ["parallel.tensor=2"]),
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


def losses(folder: Path, name: str, ranks: int, overrides: list[str], on_cpu: bool = ON_CPU) -> list[float]:
    """Train on `ranks` ranks that share one device, and return the loss of each step."""
    metrics = folder / f"{name}.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if on_cpu:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*torchrun, str(ROOT / "tests/gpu/one_card.py"), "--config", str(folder / "run.json"), "--set"]
    done = subprocess.run(
        [*command, f"logging.metrics_file={metrics}", *overrides],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
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
