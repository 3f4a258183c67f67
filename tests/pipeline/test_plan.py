import pytest
from torch_orders import printed

from megagpt.pipeline.interleaved import loop
from megagpt.pipeline.one_stage import one_f_one_b
from megagpt.pipeline.plan import Action, Kind, Message, Plan, assemble, forward_plan, messages, split_backward
from megagpt.pipeline.simulate import simulate
from megagpt.pipeline.v_shape import v_placement


def test_evaluation_has_forwards_alone():
    assert printed(forward_plan((0, 1), 3)) == [["0F0", "0F1", "0F2"], ["1F0", "1F1", "1F2"]]


def test_evaluation_keeps_stages_where_training_has_put_them():
    assert printed(forward_plan((0, 1, 1, 0), 3)) == [
        ["0F0", "0F1", "3F0", "0F2", "3F1", "3F2"],
        ["1F0", "2F0", "1F1", "2F1", "1F2", "2F2"],
    ]
    assert printed(forward_plan((0, 1, 0, 1), 3)) == [
        ["0F0", "0F1", "2F0", "2F1", "0F2", "2F2"],
        ["1F0", "1F1", "3F0", "3F1", "1F2", "3F2"],
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_evaluation_idles_only_while_the_pipe_fills_and_drains(ranks: int):
    """Messages are also needed in the order of their sending."""
    for stages in (range(ranks), v_placement(ranks), loop(ranks, 2), loop(ranks, 3)):
        for micro_batches in (1, ranks, 4 * ranks):
            played = simulate(forward_plan(stages, micro_batches))
            assert len(played.end) == len(stages) * micro_batches
            assert played.makespan <= len(stages) // ranks * micro_batches + len(stages) - 1


def test_evaluation_plays_for_numbers_that_do_not_divide():
    for ranks, chunks, micro_batches in ((2, 2, 3), (4, 2, 5), (4, 3, 2), (6, 4, 13)):
        assert len(simulate(forward_plan(loop(ranks, chunks), micro_batches)).end) == ranks * chunks * micro_batches


def test_split_backward_puts_an_i_and_its_w_in_place_of_each_b():
    assert printed(split_backward(one_f_one_b(2, 2))) == [
        ["0F0", "0F1", "0I0", "0W0", "0I1", "0W1"],
        ["1F0", "1I0", "1W0", "1F1", "1I1", "1W1"],
    ]
    assert split_backward(forward_plan((0, 1), 3)) == forward_plan((0, 1), 3)


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
    orders = (
        [Action(Kind.F, 0, 0), Action(Kind.F, 3, 0), Action(Kind.B, 3, 0), Action(Kind.B, 0, 0)],
        [Action(Kind.F, 1, 0), Action(Kind.F, 2, 0), Action(Kind.B, 2, 0), Action(Kind.B, 1, 0)],
    )
    plan = assemble(orders, (0, 1, 1, 0), 1)
    assert plan == Plan(tuple(map(tuple, orders)), (0, 1, 1, 0), 4, 1)
    assert plan.stages_of(0) == (0, 3)
    assert messages(plan, 0) == [Message(Kind.F, 3, 0, 1), Message(Kind.B, 0, 0, 1)]
    assert messages(plan, 1) == [Message(Kind.F, 1, 0, 0), Message(Kind.B, 2, 0, 0)]
