"""The collectives of a column-parallel layer's backward run beside its products: the order of starts, products and waits."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from support.pool import Pool

from megagpt.parallel import collectives, linear
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.linear import ColumnParallelLinear
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.products import PlainProducts
from megagpt.parallel.topology import Topology


class Recorded:
    """The name of a collective is recorded when it starts and when its result is waited for."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def collective(self, name: str, start: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            assert kwargs["async_op"], f"{name} blocks"
            self.events.append(f"{name} starts")
            work = start(*args, **kwargs)
            return Awaited(work, lambda: self.events.append(f"{name} is awaited"))

        return run

    def product(self, name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.events.append(name)
            return compute(*args)

        return run


class Awaited:
    def __init__(self, work: Any, on_wait: Callable[[], None]) -> None:
        self.work, self.on_wait = work, on_wait

    def wait(self) -> None:
        self.on_wait()
        self.work.wait()


def backward_events(sequence_parallel: bool, defer: bool) -> list[str]:
    """Return the events of one backward; those of a deferred weight gradient follow after "later"."""
    topology, queue, events = Topology.create(tensor=2, pipeline=1), DeferredGradients(), []
    recorded, products = Recorded(events), PlainProducts()
    parallel = ParallelContext.of(topology, sequence_parallel, queue, products=products)
    layer = ColumnParallelLinear("layer", 8, 8, parallel, 0.1)
    for parameter in layer.parameters():
        torch.nn.init.ones_(parameter)
    out = layer(torch.ones(2, 4 if sequence_parallel else 8, 8, requires_grad=True))
    patches = (
        patch.object(collectives.dist, "all_reduce", recorded.collective("all-reduce", collectives.dist.all_reduce)),
        patch.object(collectives, "all_gather_into", recorded.collective("all-gather", collectives.all_gather_into)),
        patch.object(
            collectives, "reduce_scatter_into", recorded.collective("reduce-scatter", collectives.reduce_scatter_into)
        ),
        patch.object(products, "input_gradient", recorded.product("input gradient", products.input_gradient)),
        patch.object(linear, "accumulate_product", recorded.product("weight gradient", linear.accumulate_product)),
    )
    for each in patches:
        each.start()
    try:
        if not defer:
            out.sum().backward()
            return events
        with queue.deferring() as jobs:
            out.sum().backward()
        events.append("later")
        patches[1].stop()  # the deferred job gathers its input with nothing beside it
        with torch.no_grad():
            jobs[0]()
        return events
    finally:
        patch.stopall()


def test_the_sum_of_the_input_gradient_runs_beside_the_weight_gradient(ranks: Pool) -> None:
    for events in ranks.run(2, backward_events, False, False):
        assert events == ["input gradient", "all-reduce starts", "weight gradient", "all-reduce is awaited"]


def test_under_sequence_parallelism_both_exchanges_run_beside_a_product(ranks: Pool) -> None:
    for events in ranks.run(2, backward_events, True, False):
        assert events == [
            "all-gather starts",
            "input gradient",
            "reduce-scatter starts",
            "all-gather is awaited",
            "weight gradient",
            "reduce-scatter is awaited",
        ]


def test_a_deferred_weight_gradient_leaves_its_gather_to_the_later_job(ranks: Pool) -> None:
    for events in ranks.run(2, backward_events, True, True):
        assert events == ["input gradient", "reduce-scatter starts", "reduce-scatter is awaited", "later", "weight gradient"]
