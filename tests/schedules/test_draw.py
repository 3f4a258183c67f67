import re
from xml.etree import ElementTree

import pytest

from megagpt.schedules.draw import LEFT, WIDTH, draw
from megagpt.schedules.one_f_one_b import one_f_one_b
from megagpt.schedules.plan import Plan
from megagpt.schedules.simulate import simulate
from megagpt.schedules.zbv import zbv

SVG = "{http://www.w3.org/2000/svg}"


def boxes(plan: Plan) -> list[tuple[float, float, float, str, str]]:
    """Return start, width (both as shares of the step), top, number and tool tip of each action's box."""
    root = ElementTree.fromstring(draw(plan, simulate(plan, in_order=False), "a <title> & more"))
    result = []
    for group in root.iter(f"{SVG}g"):
        rect, number, tip = (group.find(f"{SVG}{tag}") for tag in ("rect", "text", "title"))
        assert rect is not None and number is not None and tip is not None
        start, width = ((float(rect.get(key, "")) - shift) / WIDTH for key, shift in (("x", LEFT), ("width", 0)))
        result.append((start, width, float(rect.get("y", "")), number.text or "", tip.text or ""))
    return result


@pytest.mark.parametrize("plan", [one_f_one_b(3, 4), zbv(4, 8)], ids=["1f1b", "zbv"])
def test_each_action_is_one_box_at_its_simulated_time(plan: Plan):
    simulation = simulate(plan, in_order=False)
    drawn = boxes(plan)
    actions = [action for order in plan.actions for action in order]
    assert len(drawn) == len(actions)
    for action, (start, width, _, number, tip) in zip(actions, drawn, strict=True):
        assert start == pytest.approx(simulation.start[action] / simulation.makespan, abs=1e-4)
        assert width == pytest.approx((simulation.end[action] - simulation.start[action]) / simulation.makespan, abs=1e-4)
        assert number == str(action.micro_batch)
        assert f"micro-batch {action.micro_batch} on stage {action.stage}, " in tip


def test_each_rank_has_its_own_row():
    tops = [top for _, _, top, _, _ in boxes(one_f_one_b(3, 4))]
    assert len(set(tops)) == 3
    assert all(tops[8 * rank : 8 * rank + 8] == [tops[8 * rank]] * 8 for rank in range(3))


def test_the_right_side_shows_each_ranks_idle_share_and_micro_batches_in_flight():
    plan = one_f_one_b(3, 4)
    root = ElementTree.fromstring(draw(plan, simulate(plan), "1f1b"))
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert [text for text in texts if re.search(r"% · ", text)] == ["33.3% · 3", "33.3% · 2", "33.3% · 1"]


def test_each_kind_and_chunk_has_its_own_colour():
    plan = zbv(2, 4)
    text = draw(plan, simulate(plan, in_order=False), "zbv")
    fills = {match for line in text.splitlines() if line.startswith("<g>") for match in re.findall('fill="(#.{6})"', line)}
    assert len(fills) == 3 * 2  # F, I, W of two chunks


def test_the_title_is_escaped():
    plan = one_f_one_b(1, 1)
    assert "a &lt;title&gt; &amp; more" in draw(plan, simulate(plan), "a <title> & more")
