"""GPUs and networks that the planner knows, and entries of the user's own.

All bandwidths are for one direction. Does not import torch.
"""

import difflib
import json
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megagpt.errors import ConfigError
from megagpt.planner.hardware_table import DEVICE_NAMES, GPUS, NETWORKS, GPUEntry

RESERVE = 0.06
"""Share of the device memory for the CUDA context, NCCL's buffers and what the allocator cannot use."""


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal nodes."""

    gpu: GPUEntry
    network: float
    """Bandwidth of one node to the others, all its network cards together, in GB/s."""

    @property
    def gpus_per_node(self) -> int:
        """GPUs that the fast links join."""
        return self.gpu.gpus_per_node

    @property
    def usable_bytes(self) -> int:
        """Bytes of a GPU that a run can use."""
        return int(self.gpu.memory_gib * 2**30 * (1 - RESERVE))

    def peak_flops(self, precision: str) -> float:
        """Return the dense peak of matrix products in FLOP/s. Raises ConfigError if the GPU has none for `precision`."""
        if precision == "fp8" and self.gpu.fp8_tflops is None:
            raise ConfigError(f'training.precision: {self.gpu.name} has no fp8 matrix products; use "bf16"')
        if precision == "fp8":
            return float(self.gpu.fp8_tflops or 0) * 1e12
        return (self.gpu.fp32_tflops if precision == "fp32" else self.gpu.bf16_tflops) * 1e12


def find_hardware(gpu: str, network: str | None = None, file: Path | None = None) -> Hardware:
    """Return the cluster of a GPU name and a network: a name of `NETWORKS`, or GB/s of a node; the GPU's usual one if None.

    `file`: JSON with more GPUs, as `tools/benchmark_cluster.py` writes it. Raises ConfigError that names the known ones.
    """
    known = {**GPUS, **(read_hardware(file) if file is not None else {})}
    by_case = {name.lower(): entry for name, entry in known.items()}
    entry = by_case.get(gpu.lower())
    if entry is None:
        nearest = difflib.get_close_matches(gpu.lower(), by_case, n=1, cutoff=0.3)
        hint = f"; nearest: {by_case[nearest[0]].name}" if nearest else ""
        raise ConfigError(f"--gpu {gpu}: unknown GPU; known: {', '.join(known)}{hint}; others come from a file by --hardware")
    return Hardware(entry, entry.network if network is None else _network(network))


def gpu_of_device(name: str) -> GPUEntry | None:
    """Return the entry of a device by the name that its driver reports, such as "NVIDIA H100 80GB HBM3"; None if unknown."""
    return next((GPUS[entry] for part, entry in DEVICE_NAMES.items() if part in name), None)


def read_hardware(path: Path) -> dict[str, GPUEntry]:
    """Read GPUs from a JSON object: name -> keys of `GPUEntry`. `like` names a known GPU whose values are the defaults.

    Raises ConfigError with the file, the key and what was expected.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--hardware {path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--hardware {path}: is not JSON: {error}") from None
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f'--hardware {path}: expected an object of GPUs, for example {{"my-gpu": {{"like": "A100-80GB"}}}}')
    return {name: _entry(path, name, keys) for name, keys in tree.items()}


def _entry(path: Path, name: str, keys: Any) -> GPUEntry:
    if not isinstance(keys, dict):
        raise ConfigError(f"--hardware {path}: {name}: expected an object, not {json.dumps(keys)[:40]}")
    values = dict(keys)
    like = values.pop("like", None)
    if like is not None and like not in GPUS:
        raise ConfigError(f"--hardware {path}: {name}.like: unknown GPU {json.dumps(like)}; known: {', '.join(GPUS)}")
    numbers = {field.name for field in fields(GPUEntry)} - {"name", "source"}
    for key, value in values.items():
        if key == "source" and isinstance(value, str):
            continue
        if key not in numbers:
            nearest = difflib.get_close_matches(key, numbers, n=1, cutoff=0.0)[0]
            raise ConfigError(f"--hardware {path}: {name}.{key}: no such key; nearest: {nearest}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and 0 < value < 1e9) and not (key == "fp8_tflops" and value is None):
            raise ConfigError(f"--hardware {path}: {name}.{key}: expected a number above 0, not {json.dumps(value)[:40]}")
    if like is not None:
        return replace(GPUS[like], **{"source": str(path), **values, "name": name})
    optional = ("name", "source", "fp8_tflops", "fp32_tflops")
    required = [field.name for field in fields(GPUEntry) if field.default is MISSING and field.name not in optional]
    missing = [key for key in required if key not in values]
    if missing:
        raise ConfigError(f'--hardware {path}: {name}: {missing[0]} is missing; set it, or take it from a known GPU by "like"')
    defaults = {"source": str(path), "fp8_tflops": None, "fp32_tflops": values["bf16_tflops"] / 8}
    return GPUEntry(**{**defaults, **values, "name": name})


def _network(text: str) -> float:
    by_case = {name.lower(): bandwidth for name, bandwidth in NETWORKS.items()}
    if text.lower() in by_case:
        return by_case[text.lower()]
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise ConfigError(f"--network {text}: expected GB/s of a node above 0, or one of {', '.join(NETWORKS)}")
    return value
