"""The banner's numbers are those of the config and the data."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from support.pool import Pool
from support.runs import corpus, open_trainer, tiny_config

from megagpt.config import Config
from megagpt.data.blend import build_datasets
from megagpt.parallel.topology import Layout
from megagpt.planner.memory import peak_memory
from megagpt.planner.strategy import Strategy
from megagpt.training.banner import (
    announce_run,
    banner,
    data_lines,
    device_line,
    evaluation_lines,
    layout_line,
    length_lines,
    memory_line,
    output_lines,
)


def test_the_layout_is_one_product() -> None:
    config = tiny_config(parallel={"tensor": 2, "pipeline": 2}, zero={"stage": 2})
    assert layout_line(config, Layout(data=3, tensor=2, pipeline=2)) == (
        "data 3 x pipeline 2 x context 1 x tensor 2 = 12 ranks, ZeRO-2, 1f1b"
    )


def test_batch_and_length_count_tokens_and_a_resumed_run_names_its_first_step() -> None:
    config = tiny_config(training={"micro_batch_size": 2})
    assert length_lines(config, 0, 10) == [
        "batch      16 sequences x 16 = 256 tokens per step; micro-batch 2",
        "steps      10, at most 2,560 tokens",
    ]
    assert length_lines(config, 4, 10)[1] == "steps      4 to 10, at most 2,560 tokens"


def test_the_data_has_its_size_and_the_number_of_times_that_it_is_read(tmp_path: Path) -> None:
    prefix = corpus(tmp_path)
    config = tiny_config(data={"train": prefix}, evaluation={"interval": 5, "samples": 7})
    dataset = build_datasets(config.data, 16).train
    samples = dataset.samples_per_epoch
    assert data_lines(config, dataset, 2 * samples) == [
        f"data       {prefix}: {samples:,} samples, {samples * 16:,} tokens, read 2.00 times"
    ]
    (line,) = evaluation_lines(config, {"eval": dataset}, dataset)
    assert line == (
        f"evaluation every 5 steps and at the end on 7 of {samples} samples (112 tokens) of the validation data; "
        f"at the end on all {samples} samples ({samples * 16:,} tokens) of the test data"
    )
    assert evaluation_lines(config, {}, None) == []


def test_everything_that_is_written_is_named() -> None:
    config = tiny_config(checkpoint={"dir": "runs/x", "interval": 3}, logging={"metrics_file": "runs/x.jsonl"})
    assert output_lines(config) == ["writes     checkpoints to runs/x every 3 steps and at the end; metrics to runs/x.jsonl"]
    assert output_lines(tiny_config()) == []


@pytest.mark.parametrize(
    ("name", "own", "text"),
    [
        ("NVIDIA A100", None, "peak 312 TFLOP/s"),
        ("NVIDIA A100", 500.0, "peak 500 TFLOP/s"),
        ("Other", 77.5, "peak 77.5 TFLOP/s"),
        ("Other", None, "no MFU, because its peak is not known; logging.peak_tflops sets it"),
    ],
)
def test_a_gpu_has_its_peak_or_a_reason_for_having_none(
    name: str, own: float | None, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    config = tiny_config(training={"precision": "bf16"}, logging={"peak_tflops": own})
    assert device_line(torch.device("cuda", 0), config) == f"{name}, bf16, {text}"
    assert device_line(torch.device("cpu"), tiny_config()) == "CPU, fp32"


def test_the_memory_is_the_planner_s_prediction_with_its_parts() -> None:
    """fp32: 4 bytes for a weight, 4 for its gradient, 12 for the optimizer's copy and two moments."""
    config = tiny_config(zero={"stage": 0}, model={"n_embd": 64})
    strategy = Strategy.of(config, 4, compiled=False)
    peak = peak_memory(config, strategy)
    assert (peak.weights, peak.optimizer) == (4 * peak.parameters, 12 * peak.parameters)
    text = memory_line(config, Layout(data=4), peak.parameters, compiled=False)
    assert text.startswith(
        f"predicted peak {peak.total / 2**20:.3g} MiB on the largest rank: weights {peak.weights / 2**20:.3g} "
    )
    assert f"activations {peak.activations / 2**20:.3g} MiB" in text


def test_frozen_weights_have_an_upper_limit_without_activations() -> None:
    config = tiny_config(zero={"stage": 0}, training={"freeze": ["embedding.*"]})
    text = memory_line(config, Layout(data=4), 2**20, compiled=False)
    assert text.startswith("the largest rank has 1,048,576 parameters: at most 20 MiB of")


def announced(config: Config, capture: Path) -> str:
    """Announce a run; return what this rank has printed."""
    trainer = open_trainer(config)
    path = capture / f"rank_{trainer.topology.rank}"
    with path.open("w") as stream, contextlib.redirect_stdout(stream):
        announce_run(trainer)
    trainer.close()
    return path.read_text()


def test_only_rank_0_prints_and_the_memory_is_that_of_the_largest_rank(ranks: Pool, tmp_path: Path) -> None:
    config = tiny_config(
        model={"vocab_size": 1009, "tie_embeddings": False, "n_layer": 3},
        data={"train": corpus(tmp_path)},
        parallel={"pipeline": 3},
    )
    text, *silence = ranks.run(3, announced, config, tmp_path)
    peak = peak_memory(config, Strategy.of(config, 3, compiled=False))
    assert f"predicted peak {peak.total / 2**20:.3g} MiB on the largest rank" in text
    assert silence == ["", ""]


def labels(lines: list[str]) -> list[str]:
    """Return the first word of each line of a banner; some have none."""
    return [line[:11].strip() for line in lines[1:]]


def example_banner(config: Config) -> list[str]:
    return banner(open_trainer(config), 1)


def test_the_banner_in_the_readme_has_the_lines_of_a_run(ranks: Pool, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```text\n(megagpt .*?)```", readme, re.DOTALL)
    data = corpus(tmp_path)
    config = tiny_config(
        data={"train": data, "valid": data, "test": data},
        checkpoint={"dir": str(tmp_path / "checkpoints")},
    )
    (lines,) = ranks.run(1, example_banner, config)
    expected = labels(lines)
    shown = labels(block.splitlines())
    assert expected == ["model", "layout", "memory", "device", "kernels", "batch", "steps", "data", "evaluation", "writes"]
    assert shown[: len(expected)] == expected
