"""Speed and memory of the training steps since the last report."""

import resource
import time

import torch

from megagpt.config.schema import Config
from megagpt.planner.hardware import gpu_of_device
from megagpt.training.loggers.base import MetricsRecord

OTHER_PEAKS = {
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "A10G": 70.0,
    "L40S": 362.1,
    "RTX 4090": 165.2,
    "V100": 125.0,
}
"""Dense bf16 or fp16 peak with fp32 accumulation in TFLOP/s of GPUs that the planner does not know, by a part of the device
name; first match counts.

From NVIDIA's data sheets (half of the values that they give with sparsity), the Ada architecture paper (RTX 4090), AWS (A10G).
"""
FP16_ONLY = ("V100",)
"""Devices without bf16 in their matrix units."""


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """Return the device's peak for bf16 or fp16 matrix products in TFLOP/s; None if unknown, and for fp32.

    For fp32 the peak depends on whether torch uses TF32, so there is no MFU. For fp8 it is the peak of bf16, so that the MFU
    shows what the 8 bits gain.
    """
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    if precision == "bf16" and any(part in name for part in FP16_ONLY):
        return None
    gpu = gpu_of_device(name)
    return gpu.bf16_tflops if gpu else next((peak for part, peak in OTHER_PEAKS.items() if part in name), None)


def peak_of_run(config: Config, device: torch.device) -> float | None:
    """Return the peak in TFLOP/s that the MFU of a run is a share of; None if it is unknown."""
    return config.logging.peak_tflops or peak_tflops(device, config.training.precision)


def peak_memory_gib(device: torch.device) -> float:
    """Return the largest memory use so far in GiB: of torch's allocator on a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux reports KiB


class ThroughputWindow:
    """The steps since the last report. Time of evaluations and saves is not included."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.steps = 0
        self.tokens = 0
        self.seconds_waited = 0.0
        """Time that this rank waited for data."""
        self.batch_size = 0
        """Sequences in the last step."""

    def add_step(self, n_tokens: int, batch_size: int, seconds_waited: float) -> None:
        """Count one step."""
        self.steps += 1
        self.tokens += n_tokens
        self.batch_size = batch_size
        self.seconds_waited += seconds_waited

    @property
    def seconds(self) -> float:
        """Time since the window started."""
        return time.monotonic() - self.start

    def record(self, flops_per_token: int, world_size: int, peak: float | None) -> MetricsRecord:
        """Return the speed metrics.

        tflops_per_device: model FLOPs (`flops_per_token` of forward and backward) per second and device. mfu: its share
        of the device's `peak` in TFLOP/s (Chowdhery et al., arXiv 2204.02311, appendix B); left out if the peak is
        unknown.
        """
        seconds = self.seconds
        tflops = flops_per_token * self.tokens / seconds / world_size / 1e12
        record = {
            "tokens_per_second": self.tokens / seconds,
            "tokens_per_second_per_device": self.tokens / seconds / world_size,
            "step_seconds": seconds / self.steps,
            "data_wait_fraction": self.seconds_waited / seconds,
            "tflops_per_device": tflops,
        }
        return record if peak is None else record | {"mfu": tflops / peak}
