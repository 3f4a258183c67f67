"""The split of layers into stages: no split has a cheaper most expensive stage, and none as cheap is more even."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.pipeline.partition import balance


def stage_costs(parts: list[range], costs: list[float], first: float, last: float) -> list[float]:
    totals = [float(sum(costs[layer] for layer in part)) for part in parts]
    totals[0] += first
    totals[-1] += last
    return totals


def all_splits(layers: int, stages: int) -> list[list[range]]:
    cuts = combinations(range(1, layers), stages - 1)
    return [[range(a, b) for a, b in pairwise([0, *cut, layers])] for cut in cuts]


costs_and_stages = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=9).flatmap(
    lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)), st.integers(0, 30), st.integers(0, 30))
)


@settings(max_examples=300, deadline=None)
@given(costs_and_stages)
def test_no_split_is_better_than_the_chosen_one_nor_as_good_and_more_even(case):
    costs, stages, first, last = case
    parts = balance(costs, stages, first, last)
    splits = all_splits(len(costs), stages)
    peak = {tuple(split): max(stage_costs(split, costs, first, last)) for split in splits}
    assert peak[tuple(parts)] == min(peak.values())
    unevenness = {split: sum(len(part) ** 2 for part in split) for split in peak if peak[split] == min(peak.values())}
    assert unevenness[tuple(parts)] == min(unevenness.values())


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1e15), min_size=1, max_size=40).flatmap(lambda c: st.tuples(st.just(c), st.integers(1, len(c)))),
    st.floats(0, 1e15),
    st.floats(0, 1e15),
)
def test_every_layer_is_on_one_stage_in_order_and_no_stage_is_empty(case, first, last):
    costs, stages = case
    parts = balance(costs, stages, first, last)
    assert [layer for part in parts for layer in part] == list(range(len(costs)))
    assert len(parts) == stages and all(parts)


def test_thirty_layers_on_four_stages_lose_none():
    parts = balance([1.0] * 30, 4, 0, 0)
    assert [layer for part in parts for layer in part] == list(range(30))
    assert [len(part) for part in parts] == [7, 7, 8, 8]


def test_equal_layers_that_divide_are_split_evenly():
    for stages in (1, 2, 4, 8, 16):
        assert [len(part) for part in balance([0.1] * 32, stages, 0, 0)] == [32 // stages] * stages


def test_an_expensive_output_layer_takes_layers_off_the_last_stage():
    assert [len(part) for part in balance([1.0] * 12, 4, 0, 3)][-1] == 1  # so that no stage costs more than 4


def test_an_expensive_embedding_takes_layers_off_the_first_stage():
    assert [len(part) for part in balance([1.0] * 12, 4, 3, 0)] == [1, 3, 4, 4]


@pytest.mark.parametrize("stages", [0, 5])
def test_more_stages_than_layers_or_none_is_an_error(stages: int):
    with pytest.raises(ValueError, match=f"4 layers cannot fill {stages} stages"):
        balance([1.0] * 4, stages, 0, 0)
