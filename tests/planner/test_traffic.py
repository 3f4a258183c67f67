"""The closed formulas against what the process groups of a real step are asked for, to the byte."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from support.pool import Pool
from support.runs import Tree, micro_batches, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from megagpt.config import Config
from megagpt.config.rules import INTERLEAVED, chunks_per_rank
from megagpt.config.schema import Schedule
from megagpt.engine.engine import Engine
from megagpt.parallel.context_parallel import ContextParallel
from megagpt.parallel.topology import Topology
from megagpt.planner.collective_counter import counting
from megagpt.planner.traffic import Amount, Launcher, rank_parameters, step_traffic

LAYOUTS: dict[str, tuple[int, Tree]] = {
    "tensor 2": (2, {"parallel": {"tensor": 2}}),
    "tensor 4": (4, {"parallel": {"tensor": 4}}),
    "tensor 2, full recompute": (2, {"parallel": {"tensor": 2}, "training": {"recompute": "full"}}),
    "tensor 2, sequence parallel": (2, {"parallel": {"tensor": 2, "sequence_parallel": True}}),
    "pipeline 2": (2, {"parallel": {"pipeline": 2}}),
    "pipeline 4, untied": (4, {"parallel": {"pipeline": 4}, "model": {"tie_embeddings": False}}),
    "data 2, ZeRO-0": (2, {"zero": {"stage": 0}}),
    "data 2, ZeRO-1": (2, {"zero": {"stage": 1}}),
    "data 2, ZeRO-2": (2, {"zero": {"stage": 2}}),
    "tensor 2, full recompute of 3 layers together": (
        2,
        {"parallel": {"tensor": 2}, "training": {"recompute": "full", "recompute_layers": 3}},
    ),
    "pipeline 2, interleaved": (2, {"parallel": {"pipeline": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2}}),
    "context 2": (2, {"parallel": {"context": 2}}),
    "context 2 x tensor 2, sequence parallel, full recompute": (
        4,
        {"parallel": {"context": 2, "tensor": 2, "sequence_parallel": True}, "training": {"recompute": "full"}},
    ),
    "2 x 2 x 2": (8, {"parallel": {"tensor": 2, "pipeline": 2}}),
    "2 x 2 x 2, sequence parallel": (8, {"parallel": {"tensor": 2, "pipeline": 2, "sequence_parallel": True}}),
}


def measured(config: Config) -> Any:
    """This rank's second step: what it said, where it stands, and how many parameters it holds."""
    parallel = config.parallel
    topology = Topology.create(parallel.tensor, parallel.pipeline, context=parallel.context)
    engine = Engine(config, topology, torch.device("cpu"))
    context = ContextParallel(rank=topology.cp_rank, size=topology.layout.context)
    for step in range(2):
        batches = micro_batches(config, step, topology.dp_rank, topology.layout.data)
        batches = [replace(batch, tokens=context.part(batch.tokens), labels=context.part(batch.labels)) for batch in batches]
        with counting(topology) as traffic:
            engine.train_step(batches, count_labels(config, step), 1e-3)
    stages, held = tuple(engine.chunks), sum(parameter.numel() for parameter in engine.parameters)
    engine.close()
    found = {tuple(kind): Amount(traffic.calls[kind], traffic.bytes[kind]) for kind in traffic.calls}
    n_stages = parallel.pipeline * chunks_per_rank(config)
    return found, Launcher(stages, n_stages, parallel.tensor, topology.layout.dp_cp, parallel.context), held


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_says_what_the_formulas_say_and_nothing_else(name: str, ranks: Pool) -> None:
    world, sections = LAYOUTS[name]
    config = tiny_config(**sections)
    for found, place, held in ranks.run(world, measured, config):
        assert rank_parameters(config, place) == held
        expected = step_traffic(config, place)
        for kind in found.keys() | expected.keys():
            if kind[0] in ("model", "other"):  # gradient norms; groups of one rank, in which nothing is moved
                continue
            assert kind in expected, (name, kind, found[kind])
            if kind[0] == "data":  # in as many calls as there are buckets; the overflow check and the norm besides
                assert 0 <= found[kind].bytes - expected[kind].bytes <= 64, (name, kind)
                assert found[kind].calls >= expected[kind].calls, (name, kind)
            else:
                assert found[kind] == expected[kind], (name, kind)


def test_norms_and_overflow_checks_are_a_few_bytes(ranks: Pool) -> None:
    for found, *_ in ranks.run(8, measured, tiny_config(**LAYOUTS["2 x 2 x 2"][1])):
        assert found["model", "all-reduce"].bytes <= 64


def tensor_traffic_and_products(config: Config) -> Any:
    """Of one step of this rank: calls and bytes in the tensor group, and floating-point operations of its products."""
    topology = Topology.create(config.parallel.tensor, config.parallel.pipeline)
    engine = Engine(config, topology, torch.device("cpu"))
    batches = micro_batches(config, 0, topology.dp_cp_rank, topology.layout.dp_cp)
    with counting(topology) as traffic, FlopCounterMode(display=False) as flops:
        engine.train_step(batches, count_labels(config, 0), 1e-3)
    engine.close()
    within = {kind.call: (traffic.calls[kind], traffic.bytes[kind]) for kind in traffic.calls if kind.group == "tensor"}
    return within, flops.get_total_flops()


def test_every_schedule_makes_the_same_calls_and_products(ranks: Pool) -> None:
    """A backward split in two that ran anything twice would show. Biases' sums of chunks with other layers aside."""
    totals = {}
    for schedule in get_args(Schedule):
        chunks = {"virtual_stages": 2} if schedule in INTERLEAVED else {}
        parallel = {"tensor": 2, "pipeline": 2, "schedule": schedule, **chunks}
        results = ranks.run(4, tensor_traffic_and_products, tiny_config(parallel=parallel))
        calls = [(call, amount) for within, _ in results for call, amount in within.items()]
        summed = {kind: tuple(map(sum, zip(*[a for call, a in calls if call == kind], strict=True))) for kind, _ in calls}
        totals[schedule] = (summed, sum(flops for _, flops in results))
    assert totals["1f1b"][1] > 0
    assert all(total == totals["1f1b"] for total in totals.values()), totals
