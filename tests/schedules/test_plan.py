import pytest
from torch_orders import printed

from megagpt.schedules.common import loop_placement, v_placement
from megagpt.schedules.one_f_one_b import one_f_one_b
from megagpt.schedules.plan import Action, ActionKind, Message, Plan, build_plan, forward_plan, messages, split_backward
from megagpt.schedules.simulate import simulate


def test_evaluation_has_forwards_only():
    assert printed(forward_plan((0, 1), 3)) == [["0F0", "0F1", "0F2"], ["1F0", "1F1", "1F2"]]


def test_evaluation_keeps_the_stage_placement_of_training():
    assert printed(forward_plan((0, 1, 1, 0), 3)) == [
        ["0F0", "0F1", "3F0", "0F2", "3F1", "3F2"],
        ["1F0", "2F0", "1F1", "2F1", "1F2", "2F2"],
    ]
    assert printed(forward_plan((0, 1, 0, 1), 3)) == [
        ["0F0", "0F1", "2F0", "2F1", "0F2", "2F2"],
        ["1F0", "1F1", "3F0", "3F1", "1F2", "3F2"],
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_evaluation_idles_only_while_the_pipeline_fills_and_drains(ranks: int):
    """The simulation also checks that messages are needed in the order in which they are sent."""
    for stages in (range(ranks), v_placement(ranks), loop_placement(ranks, 2), loop_placement(ranks, 3)):
        for micro_batches in (1, ranks, 4 * ranks):
            simulation = simulate(forward_plan(stages, micro_batches))
            assert len(simulation.end) == len(stages) * micro_batches
            assert simulation.makespan <= len(stages) // ranks * micro_batches + len(stages) - 1


def test_evaluation_works_for_numbers_that_do_not_divide():
    for ranks, chunks, micro_batches in ((2, 2, 3), (4, 2, 5), (4, 3, 2), (6, 4, 13)):
        assert len(simulate(forward_plan(loop_placement(ranks, chunks), micro_batches)).end) == ranks * chunks * micro_batches


def test_split_backward_replaces_each_b_by_an_i_and_its_w():
    assert printed(split_backward(one_f_one_b(2, 2))) == [
        ["0F0", "0F1", "0I0", "0W0", "0I1", "0W1"],
        ["1F0", "1I0", "1W0", "1F1", "1I1", "1W1"],
    ]
    assert split_backward(forward_plan((0, 1), 3)) == forward_plan((0, 1), 3)


def test_messages_are_listed_by_source_in_sending_order():
    plan = one_f_one_b(3, 2)
    assert messages(plan, 0) == [Message(ActionKind.BACKWARD, 0, 0, 1), Message(ActionKind.BACKWARD, 0, 1, 1)]
    assert messages(plan, 1) == [
        Message(ActionKind.FORWARD, 1, 0, 0),
        Message(ActionKind.FORWARD, 1, 1, 0),
        Message(ActionKind.BACKWARD, 1, 0, 2),
        Message(ActionKind.BACKWARD, 1, 1, 2),
    ]
    assert messages(plan, 2) == [Message(ActionKind.FORWARD, 2, 0, 1), Message(ActionKind.FORWARD, 2, 1, 1)]
    assert messages(split_backward(plan), 1) == messages(plan, 1)


def test_one_rank_receives_no_messages():
    assert messages(one_f_one_b(1, 4), 0) == []


def test_neighbouring_stages_on_one_rank_exchange_no_message():
    """A V of four stages on two ranks: stages 1 and 2 share rank 1."""
    orders = (
        [
            Action(ActionKind.FORWARD, 0, 0),
            Action(ActionKind.FORWARD, 3, 0),
            Action(ActionKind.BACKWARD, 3, 0),
            Action(ActionKind.BACKWARD, 0, 0),
        ],
        [
            Action(ActionKind.FORWARD, 1, 0),
            Action(ActionKind.FORWARD, 2, 0),
            Action(ActionKind.BACKWARD, 2, 0),
            Action(ActionKind.BACKWARD, 1, 0),
        ],
    )
    plan = build_plan(orders, (0, 1, 1, 0), 1)
    assert plan == Plan(tuple(map(tuple, orders)), (0, 1, 1, 0), 4, 1)
    assert plan.stages_of(0) == (0, 3)
    assert messages(plan, 0) == [Message(ActionKind.FORWARD, 3, 0, 1), Message(ActionKind.BACKWARD, 0, 0, 1)]
    assert messages(plan, 1) == [Message(ActionKind.FORWARD, 1, 0, 0), Message(ActionKind.BACKWARD, 2, 0, 0)]
