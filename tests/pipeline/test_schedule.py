from collections import Counter
from itertools import product
from typing import get_args

import pytest

from megagpt.config.schema import Schedule
from megagpt.pipeline.schedule import (
    Action,
    Kind,
    Message,
    Plan,
    forward_only,
    gpipe,
    make_plan,
    messages,
    one_f_one_b,
    split_backward,
)

SIZES = list(product((1, 2, 3, 4, 7, 16), (1, 2, 3, 5, 16, 64)))


def printed(plan: Plan) -> list[list[str]]:
    return [[str(action) for action in order] for order in plan.actions]


def test_one_f_one_b_written_out():
    assert printed(one_f_one_b(3, 4)) == [
        ["0F0", "0F1", "0F2", "0B0", "0F3", "0B1", "0B2", "0B3"],
        ["1F0", "1F1", "1B0", "1F2", "1B1", "1F3", "1B2", "1B3"],
        ["2F0", "2B0", "2F1", "2B1", "2F2", "2B2", "2F3", "2B3"],
    ]


def test_gpipe_written_out():
    assert printed(gpipe(2, 2)) == [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1F1", "1B0", "1B1"]]


def test_evaluation_has_forwards_alone():
    assert printed(forward_only(2, 3)) == [["0F0", "0F1", "0F2"], ["1F0", "1F1", "1F2"]]


@pytest.mark.parametrize("name", get_args(Schedule))
def test_every_schedule_of_the_config_computes_each_stage_and_micro_batch_once(name: Schedule):
    for stages, micro_batches in SIZES:
        plan = make_plan(name, stages, micro_batches)
        everything = product((Kind.F, Kind.B), range(stages), range(micro_batches))
        assert Counter(a for order in plan.actions for a in order) == Counter(Action(*which) for which in everything)
        assert plan.rank_of_stage == tuple(range(stages))
        assert [plan.stages_of(rank) for rank in range(plan.n_ranks)] == [(rank,) for rank in range(stages)]


@pytest.mark.parametrize("stages, micro_batches", [(2, 2), (3, 7), (4, 4), (4, 8), (8, 16)])
def test_one_f_one_b_is_torchs_order_on_every_rank_but_the_last(stages: int, micro_batches: int):
    """torch 2.13 prints its last rank's forwards off by one (0F1 first, and one that does not exist at the end)."""
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
    from torch.distributed.pipelining.schedules import Schedule1F1B

    theirs = [
        [str(op) for op in order if op is not None and op.computation_type.value in "FB"]
        for order in get_schedule_ops(Schedule1F1B, stages, micro_batches)
    ]
    assert printed(one_f_one_b(stages, micro_batches))[:-1] == theirs[:-1]


def test_split_backward_puts_an_i_and_its_w_in_place_of_each_b():
    assert printed(split_backward(one_f_one_b(2, 2))) == [
        ["0F0", "0F1", "0I0", "0W0", "0I1", "0W1"],
        ["1F0", "1I0", "1W0", "1F1", "1I1", "1W1"],
    ]
    assert split_backward(forward_only(2, 3)) == forward_only(2, 3)


def test_messages_come_by_source_in_the_order_of_sending():
    plan = one_f_one_b(3, 2)
    assert messages(plan, 0) == [Message(Kind.B, 0, 0, 1), Message(Kind.B, 0, 1, 1)]
    assert messages(plan, 1) == [
        Message(Kind.F, 1, 0, 0),
        Message(Kind.F, 1, 1, 0),
        Message(Kind.B, 1, 0, 2),
        Message(Kind.B, 1, 1, 2),
    ]
    assert messages(plan, 2) == [Message(Kind.F, 2, 0, 1), Message(Kind.F, 2, 1, 1)]
    assert messages(split_backward(plan), 1) == messages(plan, 1)


def test_one_stage_exchanges_nothing():
    assert messages(one_f_one_b(1, 4), 0) == []


def test_neighbouring_stages_on_one_rank_exchange_no_message():
    """A V of four stages on two ranks: stages 1 and 2 share rank 1."""
    ranks = (0, 1, 1, 0)
    orders = (
        [Action(Kind.F, 0, 0), Action(Kind.F, 3, 0), Action(Kind.B, 3, 0), Action(Kind.B, 0, 0)],
        [Action(Kind.F, 1, 0), Action(Kind.F, 2, 0), Action(Kind.B, 2, 0), Action(Kind.B, 1, 0)],
    )
    plan = Plan(tuple(map(tuple, orders)), ranks, 4, 1)
    assert plan.stages_of(0) == (0, 3)
    assert messages(plan, 0) == [Message(Kind.F, 3, 0, 1), Message(Kind.B, 0, 0, 1)]
    assert messages(plan, 1) == [Message(Kind.F, 1, 0, 0), Message(Kind.B, 2, 0, 0)]
