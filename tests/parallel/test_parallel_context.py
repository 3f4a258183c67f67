"""The record of this rank's parallelism: a single process by default, else the topology's tensor and context axes."""

from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.topology import Layout, Topology


def test_the_default_is_a_single_process_with_a_queue_of_its_own() -> None:
    first, second = ParallelContext(), ParallelContext()
    assert (first.tp_group, first.tp_rank, first.tp_size, first.sequence_parallel) == (None, 0, 1, False)
    assert (first.context.group, first.context.rank, first.context.size) == (None, 0, 1)
    assert first.deferred_gradients is not second.deferred_gradients


def test_the_ranks_and_sizes_are_those_of_the_topology() -> None:
    layout, deferred = Layout(tensor=4, pipeline=2, context=2, data=3), DeferredGradients()
    for rank in range(layout.world_size):
        parallel = ParallelContext.of(Topology(layout, rank), True, deferred)
        coordinates = layout.coordinates(rank)
        assert (parallel.tp_rank, parallel.tp_size) == (coordinates.tensor, 4)
        assert (parallel.context.rank, parallel.context.size) == (coordinates.context, 2)
        assert parallel.sequence_parallel and parallel.deferred_gradients is deferred
