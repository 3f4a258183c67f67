"""The grid of ranks: coordinates, neighbours along each axis, and process groups that agree with them."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pool import Pool

from megagpt.parallel.topology import AXES, Coordinates, Layout, Topology

sizes = st.integers(1, 4)
layouts = st.builds(Layout, tensor=sizes, pipeline=sizes, context=sizes, data=sizes)
axis_sets = st.sets(st.sampled_from(AXES))


def layouts_with_a_rank() -> st.SearchStrategy[tuple[Layout, int]]:
    return layouts.flatmap(lambda layout: st.tuples(st.just(layout), st.integers(0, layout.world_size - 1)))


@settings(deadline=None)
@given(layouts)
def test_every_rank_has_its_own_coordinates_and_every_point_of_the_grid_its_rank(layout: Layout) -> None:
    points = [Coordinates(*point) for point in product(*map(range, layout.sizes))]
    assert [layout.rank(point) for point in points] == list(range(layout.world_size))
    assert [layout.coordinates(rank) for rank in range(layout.world_size)] == points


@settings(deadline=None)
@given(layouts, axis_sets)
def test_the_ranks_along_axes_divide_the_world_into_equal_groups(layout: Layout, axes: set[str]) -> None:
    groups = {tuple(layout.ranks_along(rank, *axes)) for rank in range(layout.world_size)}
    size = 1
    for axis in axes:
        size *= getattr(layout, axis)
    assert all(len(group) == size for group in groups)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))


@settings(deadline=None)
@given(layouts_with_a_rank(), axis_sets)
def test_the_ranks_along_axes_differ_in_these_axes_only_and_are_sorted(case: tuple[Layout, int], axes: set[str]) -> None:
    layout, rank = case
    ranks = layout.ranks_along(rank, *axes)
    assert rank in ranks and ranks == sorted(ranks)
    own = layout.coordinates(rank)
    for other in ranks:
        coordinates = layout.coordinates(other)
        assert all(getattr(coordinates, axis) == getattr(own, axis) for axis in AXES if axis not in axes)


@settings(deadline=None)
@given(layouts_with_a_rank())
def test_a_rank_s_index_along_an_axis_is_its_coordinate(case: tuple[Layout, int]) -> None:
    layout, rank = case
    topology = Topology(layout, rank)
    for axis, index in (
        ("tensor", topology.tp_rank),
        ("pipeline", topology.pp_rank),
        ("data", topology.dp_rank),
        ("context", topology.cp_rank),
    ):
        assert layout.ranks_along(rank, axis).index(rank) == index
    assert layout.ranks_along(rank, "data", "context").index(rank) == topology.dp_cp_rank
    assert layout.dp_cp == layout.data * layout.context


@settings(deadline=None)
@given(layouts_with_a_rank())
def test_tensor_ranks_are_neighbours_and_pipeline_ranks_are_farthest_apart(case: tuple[Layout, int]) -> None:
    layout, rank = case
    tensor = layout.ranks_along(rank, "tensor")
    assert tensor == list(range(tensor[0], tensor[0] + layout.tensor))
    stages = layout.ranks_along(rank, "pipeline")
    assert stages == [stages[0] + stage * layout.world_size // layout.pipeline for stage in range(layout.pipeline)]


def test_a_single_process_has_no_group_and_is_first_everywhere() -> None:
    topology = Topology()
    assert topology.layout.world_size == 1 and topology.coordinates == Coordinates(0, 0, 0, 0)
    assert list(groups_of(topology)) == []


def test_context_groups_are_neighbours_among_the_data_ranks() -> None:
    layout = Layout(tensor=2, context=2, data=2)
    places = [layout.coordinates(rank) for rank in range(8)]
    assert [(place.data, place.context) for place in places] == [(0, 0), (0, 0), (0, 1), (0, 1), (1, 0), (1, 0), (1, 1), (1, 1)]
    ranks = [layout.ranks_along(rank, "context") for rank in range(8)]
    assert ranks == [[0, 2], [1, 3]] * 2 + [[4, 6], [5, 7]] * 2


AXES_OF_GROUP = {
    "tensor_group": ("tensor",),
    "context_group": ("context",),
    "dp_cp_group": ("data", "context"),
    "model_parallel_group": ("pipeline", "tensor"),
    "pp_forward_group": ("pipeline",),
    "pp_backward_group": ("pipeline",),
    "world_group": AXES,
}


def groups_of(topology: Topology) -> Iterator[tuple[str, Any]]:
    """Yield name and group of each group that the rank has."""
    for name in (*AXES_OF_GROUP, "embedding_group"):
        if getattr(topology, name) is not None:
            yield name, getattr(topology, name)


def created(tensor: int, pipeline: int, context: int) -> tuple[Topology, dict[str, list[int]], int]:
    """Return the topology without its groups, the ranks of each group, and the sum of ones over all groups."""
    topology = Topology.create(tensor, pipeline, context=context)
    members = {name: dist.get_process_group_ranks(group) for name, group in groups_of(topology)}
    assert topology.pp_forward_group is None or topology.pp_forward_group is not topology.pp_backward_group
    return Topology(topology.layout, topology.rank), members, dist.get_world_size()


@pytest.mark.parametrize("tensor, pipeline, context", [(2, 2, 2), (1, 4, 1), (2, 1, 1), (1, 1, 4), (8, 1, 1), (1, 1, 1)])
def test_the_groups_of_a_rank_are_its_neighbours_in_the_grid(tensor: int, pipeline: int, context: int, ranks: Pool) -> None:
    layout = Layout(tensor=tensor, pipeline=pipeline, context=context, data=8 // (tensor * pipeline * context))
    for rank, (topology, members, world) in enumerate(ranks.run(8, created, tensor, pipeline, context)):
        assert (topology.layout, topology.rank, world) == (layout, rank, 8)
        for name, axes in AXES_OF_GROUP.items():
            neighbours = layout.ranks_along(rank, *axes)
            assert members.pop(name, [rank]) == neighbours, name  # a group of one rank is None
        stages = layout.ranks_along(rank, "pipeline")
        is_end = pipeline > 1 and rank in (stages[0], stages[-1])
        assert members == ({"embedding_group": [stages[0], stages[-1]]} if is_end else {})


def sums_over(sets: list[tuple[int, ...]]) -> list[int | None]:
    """Return the sum of the ranks in each group of pipeline ranks, by its members; None on the other ranks."""
    topology = Topology.create(2, 4)
    sums = []
    for pipeline_ranks in sets:
        group, rank = topology.pipeline_group(pipeline_ranks), torch.tensor(topology.rank)
        if group is not None:
            dist.all_reduce(rank, group=group)
        sums.append(None if group is None else int(rank))
    return sums


def test_groups_of_some_pipeline_ranks_do_not_wait_for_the_others(ranks: Pool) -> None:
    """Sets that overlap, so that ranks are members of different numbers of groups."""
    sets, layout = [(0, 2, 3), (0, 1), (1, 2, 3), (2, 3)], Layout(tensor=2, pipeline=4)
    for rank, sums in enumerate(ranks.run(8, sums_over, sets)):
        stages, place = layout.ranks_along(rank, "pipeline"), layout.coordinates(rank).pipeline
        assert sums == [sum(stages[one] for one in members) if place in members else None for members in sets]


def create_error(tensor: int, pipeline: int, context: int) -> str:
    with pytest.raises(ValueError) as error:
        Topology.create(tensor, pipeline, context=context)
    return str(error.value)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((3, 1, 1), "tensor 3 x pipeline 1 does not divide a world of 4 ranks"),
        ((2, 4, 1), "tensor 2 x pipeline 4 does not divide a world of 4 ranks"),
        ((2, 2, 2), "tensor 2 x pipeline 2 x context 2 does not divide a world of 4 ranks"),
    ],
)
def test_sizes_that_do_not_divide_the_world_are_an_error_with_all_numbers(
    sizes: tuple[int, int, int], message: str, ranks: Pool
) -> None:
    assert ranks.run(4, create_error, *sizes) == [message] * 4
