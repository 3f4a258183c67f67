"""The measured entry is a file that the planner reads."""

import json
from pathlib import Path

import pytest
import torch
from support.pool import Pool

from megagpt.commands.benchmark_cluster import SUSTAINED, hardware_entry, measure
from megagpt.distributed.launcher import Launcher
from megagpt.planner.hardware import find_hardware


def measured_on_ranks(per_node: int) -> dict[str, float]:
    rank = torch.distributed.get_rank()
    return measure(torch.device("cpu"), Launcher(rank, 2, rank % per_node, per_node), 32, 2**14)


def test_ranks_measure_products_memory_and_links_and_the_planner_reads_them(ranks: Pool, tmp_path: Path) -> None:
    """One node of two ranks, and two nodes of one, on this machine."""
    assert ranks.run(2, measured_on_ranks, 2)[0].keys() == {"products", "memory", "link", "send"}
    found = ranks.run(2, measured_on_ranks, 1)[0]
    assert found.keys() == {"products", "memory", "network", "send"}
    assert min(found.values()) > 0
    entry = hardware_entry(torch.device("cpu"), Launcher(0, 2, 0, 1), found)
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"mine": entry}))
    gpu = find_hardware("mine", file=path).gpu
    assert (gpu.memory_bandwidth, gpu.network, gpu.gpus_per_node) == (found["memory"], found["network"], 1)


def test_a_known_gpu_gets_shares_of_its_data_sheet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    measured = {"products": 802.0, "memory": 3000.0, "link": 360.0, "network": 300.0}
    entry = hardware_entry(torch.device("cuda", 0), Launcher(0, 16, 0, 8), measured)
    assert entry["like"] == "H100"
    assert entry["products_share"] == pytest.approx(SUSTAINED * 802 / 989.4, abs=1e-4)
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"mine": entry}))
    assert find_hardware("mine", file=path).gpu.network_share == pytest.approx(SUSTAINED * 300 / 400)
