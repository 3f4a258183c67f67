"""Speed metrics by their formulas."""

import subprocess
import sys
import time

import pytest
import torch

from megagpt.training.throughput import ThroughputWindow, peak_tflops

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


class FixedWindow(ThroughputWindow):
    """A window of exactly 4 seconds."""

    @property
    def seconds(self) -> float:
        return 4.0


def two_steps() -> ThroughputWindow:
    window = FixedWindow()
    window.add_step(n_tokens=1000, batch_size=8, seconds_waited=0.25)
    window.add_step(n_tokens=3000, batch_size=16, seconds_waited=0.75)
    return window


def test_the_record_follows_from_tokens_time_and_flops() -> None:
    """4000 tokens in 4 s with 6e12 FLOPs per token on 8 devices: 6e15 / 8 FLOPs per second and device."""
    assert two_steps().record(flops_per_token=6 * 10**12, world_size=8, peak=None) == {
        "tokens_per_second": 1000.0,
        "tokens_per_second_per_device": 125.0,
        "step_seconds": 2.0,
        "data_wait_fraction": 0.25,
        "tflops_per_device": 750.0,
    }


def test_the_mfu_is_the_share_of_the_peak() -> None:
    record = two_steps().record(flops_per_token=6 * 10**12, world_size=8, peak=1000.0)
    assert record["mfu"] == 0.75


def test_a_window_has_the_batch_size_of_its_last_step() -> None:
    window = two_steps()
    assert (window.steps, window.tokens, window.batch_size, window.seconds_waited) == (2, 4000, 16, 1.0)


def test_a_window_measures_the_time_since_its_start() -> None:
    window = ThroughputWindow()
    time.sleep(0.02)
    assert window.seconds >= 0.02


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(GPU, "bf16") == peak_tflops(GPU, "fp16") == peak


def test_a_device_without_bf16_units_has_a_peak_for_fp16_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    assert (peak_tflops(GPU, "fp16"), peak_tflops(GPU, "bf16")) == (125.0, None)


def test_there_is_no_peak_for_fp32_and_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_tflops(GPU, "fp32") is None
    assert peak_tflops(CPU, "bf16") is None


def test_the_memory_of_a_cpu_is_the_peak_of_the_process() -> None:
    """In a process of its own: the peak of this one may be gigabytes above what it holds now."""
    code = (
        "import torch; from megagpt.training.throughput import peak_memory_gib as peak; cpu = torch.device('cpu');"
        "print(peak(cpu)); bytearray(int(peak(cpu) * 2**30) + 2**28); print(peak(cpu))"  # 256 MiB more, freed at once
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert 0.01 < before < 10 and before + 0.2 < after < 2 * before + 1
