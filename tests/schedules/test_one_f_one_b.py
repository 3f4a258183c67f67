from itertools import product

import pytest
from torch_orders import printed, torch_order

from megagpt.schedules.one_f_one_b import gpipe, one_f_one_b, zb_h1
from megagpt.schedules.simulate import kind_costs, simulate

SIZES = list(product((1, 2, 3, 5, 8, 16), (1, 2, 3, 7, 16, 64)))


def test_1f1b_on_three_ranks_is_this_list():
    assert printed(one_f_one_b(3, 4)) == [
        ["0F0", "0F1", "0F2", "0B0", "0F3", "0B1", "0B2", "0B3"],
        ["1F0", "1F1", "1B0", "1F2", "1B1", "1F3", "1B2", "1B3"],
        ["2F0", "2B0", "2F1", "2B1", "2F2", "2B2", "2F3", "2B3"],
    ]


def test_gpipe_on_two_ranks_is_this_list():
    assert printed(gpipe(2, 2)) == [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1F1", "1B0", "1B1"]]


def test_zb_h1_on_three_ranks_is_this_list():
    assert printed(zb_h1(3, 4)) == [
        ["0F0", "0F1", "0F2", "0I0", "0W0", "0F3", "0I1", "0W1", "0I2", "0W2", "0I3", "0W3"],
        ["1F0", "1F1", "1I0", "1F2", "1I1", "1W0", "1F3", "1I2", "1W1", "1I3", "1W2", "1W3"],
        ["2F0", "2I0", "2F1", "2I1", "2F2", "2I2", "2W0", "2F3", "2I3", "2W1", "2W2", "2W3"],
    ]


@pytest.mark.parametrize("ranks, micro_batches", [(2, 2), (3, 7), (4, 4), (4, 8), (8, 16)])
def test_1f1b_equals_torchs_order_on_every_rank_but_the_last(ranks: int, micro_batches: int):
    """torch 2.13 prints its last rank's forwards off by one (0F1 first, and one that does not exist at the end)."""
    assert printed(one_f_one_b(ranks, micro_batches))[:-1] == torch_order("1F1B", ranks, micro_batches)[:-1]


@pytest.mark.parametrize("ranks, micro_batches", [(1, 3), (2, 2), (3, 7), (4, 2), (8, 16)])
def test_gpipe_equals_torchs_order(ranks: int, micro_batches: int):
    assert printed(gpipe(ranks, micro_batches)) == torch_order("GPipe", ranks, micro_batches)


@pytest.mark.parametrize("build", [one_f_one_b, gpipe])
def test_the_bubble_equals_the_theory(build):
    """(p - 1) / (m + p - 1) of the time (Narayanan et al., arXiv 2104.04473, section 2.2.1, as a share of the makespan)."""
    for ranks, micro_batches in SIZES:
        simulation = simulate(build(ranks, micro_batches))
        bubble = (ranks - 1) / (micro_batches + ranks - 1)
        assert simulation.idle_share == pytest.approx([bubble] * ranks)
        assert simulation.makespan == 3 * (micro_batches + ranks - 1)


@pytest.mark.parametrize("forward, input_backward, weight_backward", [(1, 1, 1), (1, 1.25, 0.75), (1, 1.5, 1), (2, 3, 1)])
def test_the_bubble_of_zb_h1_equals_the_papers(forward: float, input_backward: float, weight_backward: float):
    """(p - 1)(F + I - W) (Qi et al., arXiv 2401.10241, table 2), a third of 1F1B's (p - 1)(F + I + W) if all are equal."""
    cost = kind_costs(forward, input_backward + weight_backward, input_backward, weight_backward)
    for ranks, micro_batches in SIZES:
        if micro_batches < ranks:
            continue
        work = micro_batches * (forward + input_backward + weight_backward)
        bubble = (ranks - 1) * (forward + input_backward - weight_backward)
        assert simulate(zb_h1(ranks, micro_batches), cost).makespan == pytest.approx(work + bubble)


def test_1f1b_has_at_most_ranks_minus_rank_micro_batches_in_flight():
    for ranks, micro_batches in SIZES:
        peaks = simulate(one_f_one_b(ranks, micro_batches)).peak_activations
        assert peaks == tuple(min(ranks - rank, micro_batches) for rank in range(ranks))


def test_zb_h1_has_as_many_micro_batches_in_flight_on_every_rank_as_1f1b_on_its_first():
    for ranks, micro_batches in SIZES:
        assert simulate(zb_h1(ranks, micro_batches)).peak_activations == (min(ranks, micro_batches),) * ranks


def test_gpipe_has_all_micro_batches_in_flight():
    for ranks, micro_batches in SIZES:
        assert simulate(gpipe(ranks, micro_batches)).peak_activations == (micro_batches,) * ranks
