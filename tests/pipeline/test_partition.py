from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config.schema import ModelConfig
from megagpt.pipeline.partition import balance, embedding_cost, layer_costs, output_cost, stage_layers


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
def test_no_split_is_better_than_the_one_taken_nor_as_good_and_more_even(case):
    costs, stages, first, last = case
    parts = balance(costs, stages, first, last)
    splits = all_splits(len(costs), stages)
    peak = {tuple(split): max(stage_costs(split, costs, first, last)) for split in splits}
    assert peak[tuple(parts)] == min(peak.values())
    unevenness = {split: sum(len(part) ** 2 for part in split) for split in peak if peak[split] == min(peak.values())}
    assert unevenness[tuple(parts)] == min(unevenness.values())


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


def test_thirty_layers_over_four_stages_lose_none():
    parts = balance([1.0] * 30, 4, 0, 0)
    assert [layer for part in parts for layer in part] == list(range(30))
    assert [len(part) for part in parts] == [7, 7, 8, 8]


def test_equal_layers_that_divide_are_shared_evenly():
    for stages in (1, 2, 4, 8, 16):
        assert [len(part) for part in balance([0.1] * 32, stages, 0, 0)] == [32 // stages] * stages


def test_an_expensive_output_layer_takes_layers_off_the_last_stage():
    assert [len(part) for part in balance([1.0] * 12, 4, 0, 3)][-1] == 1  # so that no stage costs more than 4


def test_an_expensive_embedding_takes_layers_off_the_first_stage():
    assert [len(part) for part in balance([1.0] * 12, 4, 3, 0)] == [1, 3, 4, 4]


@pytest.mark.parametrize("stages", [0, 5])
def test_more_stages_than_layers_or_none_is_an_error(stages: int):
    with pytest.raises(ValueError, match=f"4 layers do not make {stages} stages"):
        balance([1.0] * 4, stages, 0, 0)


GPT3 = ModelConfig(n_layer=96, n_embd=12288, n_head=96, n_positions=2048, vocab_size=51200)


def test_forward_flops_are_a_third_of_the_published_step_with_the_masked_half_of_attention_left_out():
    """72 B L s h^2 (1 + s / 6h + V / 12hL) without recompute (arXiv 2205.05198, equation 7): forward and backward."""
    h, s, n, v = GPT3.n_embd, GPT3.n_positions, GPT3.n_layer, GPT3.padded_vocab_size
    published = 72 * n * h**2 * (1 + s / (6 * h) + v / (12 * h * n)) / 3
    masked = n * 2 * s * h
    assert sum(layer_costs(GPT3)) + output_cost(GPT3) == pytest.approx(published - masked, rel=1e-12)


def test_a_wider_mlp_costs_its_matrices():
    wide = GPT3.model_copy(update={"ffn_hidden": 5 * GPT3.n_embd})
    assert layer_costs(wide)[0] - layer_costs(GPT3)[0] == 2 * 2 * GPT3.n_embd**2


def test_the_stages_of_a_model_count_embedding_and_output_layer():
    parts = stage_layers(GPT3, 8)
    assert [layer for part in parts for layer in part] == list(range(96))
    assert len(parts[-1]) <= min(map(len, parts[:-1]))
    assert embedding_cost(GPT3) < layer_costs(GPT3)[0] / 1000
    small = ModelConfig(n_layer=12, n_embd=768, n_head=12, n_positions=1024, vocab_size=50257)
    assert [len(part) for part in stage_layers(small, 4)] == [3, 4, 4, 1]  # the output layer costs as much as 4.9 blocks
