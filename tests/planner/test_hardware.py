"""GPUs and networks: values of the data sheets, entries of the user, and errors that name what is known."""

import json
from pathlib import Path

import pytest

from megagpt.errors import ConfigError
from megagpt.planner.hardware import find_hardware, gpu_of_device, read_hardware
from megagpt.planner.hardware_table import GPUS
from megagpt.planner.strategy import Strategy
from megagpt.planner.timing import Clock, Efficiency, links
from megagpt.planner.work import Call, Work


def test_every_gpu_of_the_issue_is_known_by_any_spelling_with_a_source() -> None:
    assert list(GPUS) == ["A100-40GB", "A100-80GB", "H100", "H200", "B200", "GB200", "MI250X", "MI300X"]
    assert all(entry.source for entry in GPUS.values())
    assert find_hardware("h100").gpu is GPUS["H100"]


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GB200", "GB200"),
    ],
)
def test_a_device_is_found_by_the_name_that_its_driver_reports(reported: str, name: str) -> None:
    assert gpu_of_device(reported) is GPUS[name]
    assert gpu_of_device("NVIDIA GeForce GTX 1080") is None


def test_unknown_gpus_and_networks_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="^--gpu H1000: unknown GPU; known: A100-40GB, .*; nearest: H100;"):
        find_hardware("H1000")
    with pytest.raises(ConfigError, match="^--network fast: expected GB/s of a node above 0, or one of 25GbE"):
        find_hardware("H100", "fast")
    assert find_hardware("H100", "8x200G").network == 200
    assert find_hardware("H100", "37.5").network == 37.5


def test_a_file_adds_gpus_that_are_like_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "gpus.json"
    path.write_text(json.dumps({"mine": {"like": "H100", "memory_gib": 94, "products_share": 0.6}}))
    hardware = find_hardware("Mine", file=path)
    assert (hardware.gpu.memory_gib, hardware.gpu.bf16_tflops, hardware.gpu.name) == (94, 989.4, "mine")
    slow, usual = (Clock(one, Strategy(), "bf16") for one in (hardware, find_hardware("H100")))
    ratio = slow.compute_seconds(Work(flops=1e15)) / usual.compute_seconds(Work(flops=1e15))
    assert ratio == pytest.approx(Efficiency().products / 0.6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "expected an object of GPUs"),
        ('{"a": 3}', "a: expected an object, not 3"),
        ('{"a": {"like": "H99"}}', 'a.like: unknown GPU "H99"; known: A100-40GB'),
        ('{"a": {"like": "H100", "memory": 3}}', "a.memory: no such key; nearest: memory_"),
        ('{"a": {"like": "H100", "link": -1}}', "a.link: expected a number above 0, not -1"),
        ('{"a": {"bf16_tflops": 3}}', "a: memory_gib is missing; set it, or take it from a known GPU"),
    ],
)
def test_a_wrong_file_is_one_sentence_with_the_key(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "gpus.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"^--hardware {path}: {message}"):
        read_hardware(path)


def test_a_group_between_nodes_shares_the_network_cards_of_a_node() -> None:
    """Eight tensor ranks in a node are eight data-parallel groups, each with an eighth of the node's bandwidth."""
    h100, share = find_hardware("H100"), Efficiency()
    found = links(h100, Strategy(tensor=8, data=4), share)
    assert found["tensor"].bandwidth == h100.gpu.link * 1e9 * share.link
    assert found["dp_cp"].bandwidth == pytest.approx(h100.network * 1e9 / 8 * share.network)
    assert links(h100, Strategy(data=32), share)["dp_cp"].bandwidth == pytest.approx(
        min(h100.network * share.network, h100.gpu.link * share.link) * 1e9
    )
    assert not links(h100, Strategy(tensor=4, data=2), share)["dp_cp"].between_nodes


def test_an_all_reduce_takes_as_long_as_a_reduce_scatter_and_an_all_gather() -> None:
    """2 (n - 1) / n bytes for each byte of an all-reduce, (n - 1) / n for reduce-scatter and all-gather."""
    clock = Clock(find_hardware("H100"), Strategy(tensor=4), "bf16", Efficiency(latency_seconds=0))
    reduce, scatter, gather = (
        clock.call_seconds(Call("tensor", kind, 1e9)) for kind in ("all-reduce", "reduce-scatter", "all-gather")
    )
    assert reduce == pytest.approx(scatter + gather)
    assert scatter == pytest.approx(0.75 * 1e9 / clock.links["tensor"].bandwidth)
