"""tools/benchmark_cluster.py: measure a cluster's products, memory and links, and write an entry for tools/plan.py."""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megagpt.commands import job, shell
from megagpt.distributed.launcher import Launcher
from megagpt.distributed.process_group import destroy_process_group, init_process_group
from megagpt.errors import ConfigError
from megagpt.output import lossy_output
from megagpt.planner.hardware import gpu_of_device

EXAMPLE = """examples:
  torchrun --nproc_per_node 8 tools/benchmark_cluster.py --output cluster.json
  python tools/benchmark_cluster.py --output laptop.json --size 1024 --mebibytes 16
  python tools/plan.py --config configs/125M.json --gpus 8 --gpu measured --hardware cluster.json
Start it on two nodes or more to measure the network, with the launcher of your runs. It takes about a minute. Bandwidths are in
GB/s (10^9 bytes) for one direction, products in TFLOP/s."""
SUSTAINED = 0.88
"""Share of the speed in a short measurement that training reaches: on an H100 a product of 8192^3 runs at 802 TFLOP/s, and the
planner's share, fitted on training runs, is 0.72 of 989."""
REPEATS = 3
"""Measurements of each kind, of which the median counts."""


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("benchmark_cluster", __doc__, EXAMPLE)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, for plan.py --hardware")
    parser.add_argument("--name", default="measured", help="name of the GPU in the file (%(default)s)")
    parser.add_argument("--size", type=int, default=8192, help="rows and columns of the matrices (%(default)s)")
    parser.add_argument("--mebibytes", type=int, default=256, help="MiB of a tensor that is copied or sent (%(default)s)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = job.parse_arguments(create_parser(), argv)
    return job.run(lambda launcher: _run(args, launcher), args.debug)


def _run(args: argparse.Namespace, launcher: Launcher) -> int:
    if args.size < 16 or args.mebibytes < 1:
        raise ConfigError(f"--size {args.size}, --mebibytes {args.mebibytes}: expected at least 16 and 1")
    if not args.output.parent.is_dir():
        raise ConfigError(f"--output {args.output}: there is no folder {args.output.parent}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", launcher.local_rank) if cuda else torch.device("cpu")
    init_process_group(launcher, device)
    measured = measure(device, launcher, args.size, args.mebibytes * 2**20)
    if launcher.rank == 0:
        with lossy_output():
            for name, value in measured.items():
                print(f"{name:14} {value:,.4g} {'TFLOP/s' if name == 'products' else 'GB/s'}")
        entry = hardware_entry(device, launcher, measured)
        args.output.write_text(json.dumps({args.name: entry}, indent=2) + "\n", encoding="utf-8")
        print(f"{args.output}: written", file=sys.stderr)
    dist.barrier()
    destroy_process_group()
    return 0


def measure(device: torch.device, launcher: Launcher, size: int, n_bytes: int) -> dict[str, float]:
    """Return "products" in TFLOP/s and bandwidths in GB/s: "memory", and as far as there are ranks "link", "network", "send".

    A bandwidth of an all-reduce is that of its ring, 2 (n - 1) / n bytes for each byte of the tensor. Collective.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    found = {"products": 2 * size**3 / _seconds(lambda: left @ right, device) / 1e12}
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["memory"] = 2 * n_bytes / _seconds(lambda: target.copy_(source), device) / 1e9
    tensor = torch.zeros(n_bytes // 4, dtype=torch.float32, device=device)
    per_node = min(launcher.local_size, launcher.world_size)
    if per_node > 1:
        found["link"] = _ring_bandwidth(_node_group(launcher, per_node), per_node, tensor, device)
    if launcher.world_size > per_node:
        found["network"] = _ring_bandwidth(dist.group.WORLD, launcher.world_size, tensor, device)
    if launcher.world_size > 1:
        found["send"] = 4 * tensor.numel() / _seconds(lambda: _send(tensor, launcher), device) / 1e9
    return found


def _node_group(launcher: Launcher, per_node: int) -> ProcessGroup:
    """Return the group of this node's ranks. Collective."""
    groups: list[Any] = []
    for first in range(0, launcher.world_size, per_node):
        groups.append(dist.new_group(list(range(first, min(first + per_node, launcher.world_size)))))
    group: ProcessGroup = groups[launcher.rank // per_node]
    return group


def _ring_bandwidth(group: ProcessGroup | None, ranks: int, tensor: torch.Tensor, device: torch.device) -> float:
    seconds = _seconds(lambda: dist.all_reduce(tensor, group=group), device)
    return 2 * (ranks - 1) / ranks * 4 * tensor.numel() / seconds / 1e9


def _send(tensor: torch.Tensor, launcher: Launcher) -> None:
    """Send from the first rank to the last; the others do nothing."""
    if launcher.rank == 0:
        dist.send(tensor, launcher.world_size - 1)
    elif launcher.rank == launcher.world_size - 1:
        dist.recv(tensor, 0)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of `work`, after one call that is not counted. Collective: all ranks start together."""
    times = []
    for _ in range(1 + REPEATS):
        dist.barrier()
        _synchronize(device)
        start = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return max(1e-9, statistics.median(times[1:]))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hardware_entry(device: torch.device, launcher: Launcher, measured: dict[str, float]) -> dict[str, Any]:
    """Return the keys of the entry: shares of the data sheet's values for a known GPU, else the measured values themselves."""
    known = gpu_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    per_node = min(launcher.local_size, launcher.world_size)
    source = f"measured on {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'a CPU'}"
    network = measured.get("network")
    if known is None:
        link = measured.get("link", measured["memory"])
        return {
            "bf16_tflops": measured["products"],
            "fp32_tflops": measured["products"],
            "memory_gib": _memory_bytes(device, per_node) / 2**30,
            "memory_bandwidth": measured["memory"],
            "link": link,
            "gpus_per_node": per_node,
            "network": (network or measured.get("send", link)) * (1 if network else per_node),
            **dict.fromkeys(("products_share", "memory_share", "link_share", "network_share"), SUSTAINED),
            "source": source,
        }
    shares = {
        "products_share": measured["products"] / known.bf16_tflops,
        "memory_share": measured["memory"] / known.memory_bandwidth,
    }
    if "link" in measured:
        shares["link_share"] = measured["link"] / known.link
    if network is not None:  # a ring over all GPUs of the nodes uses all network cards
        shares["network_share"] = network / known.network
    return {
        "like": known.name,
        **{key: round(SUSTAINED * share, 4) for key, share in shares.items()},
        "gpus_per_node": per_node if per_node > 1 else known.gpus_per_node,
        "source": source,
    }


def _memory_bytes(device: torch.device, per_node: int) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // per_node


if __name__ == "__main__":
    sys.exit(main())
