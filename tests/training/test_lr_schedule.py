"""The learning-rate schedules equal those of torch and transformers, and keep within their limits."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt.config.schema import LRScheduleConfig, OptimizerConfig
from megagpt.training.lr_schedule import learning_rate, weight_decay

PEAK, TOTAL = 3e-4, 200
TYPES = ("cosine", "linear", "constant", "inverse-sqrt", "warmup-stable-decay")


def curve(steps: int = TOTAL, **config: Any) -> list[float]:
    return [learning_rate(step, TOTAL, PEAK, LRScheduleConfig(**config)) for step in range(steps)]


def torch_curve(create: Any, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = create(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_equals_cosine_annealing_of_torch() -> None:
    expected = torch_curve(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=150, eta_min=3e-5), 150)
    assert curve(type="cosine", decay_steps=150, min_lr=3e-5)[:150] == pytest.approx(expected, rel=1e-9)


def test_linear_equals_linear_lr_of_torch() -> None:
    expected = torch_curve(lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=150), TOTAL)
    assert curve(type="linear", decay_steps=150, min_lr=PEAK / 10) == pytest.approx(expected, rel=1e-9)


def test_warm_up_equals_linear_lr_of_torch_up_to_the_peak() -> None:
    expected = torch_curve(lambda o: torch.optim.lr_scheduler.LinearLR(o, 1 / 20, 1.0, total_iters=19), TOTAL)
    assert curve(type="constant", warmup_steps=20) == pytest.approx(expected, rel=1e-9)


def test_warm_up_and_cosine_equal_the_two_schedulers_of_torch_in_sequence() -> None:
    def create(optimizer: Any) -> Any:
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 20, 1.0, total_iters=19)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=180, eta_min=3e-5)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[20])

    assert curve(type="cosine", warmup_steps=20, min_lr=3e-5) == pytest.approx(torch_curve(create, TOTAL), rel=1e-9)


def test_inverse_sqrt_equals_the_schedule_of_the_transformer_paper() -> None:
    expected = [PEAK * math.sqrt(10) * min((step + 1) ** -0.5, (step + 1) * 10**-1.5) for step in range(TOTAL)]
    assert curve(type="inverse-sqrt", warmup_steps=10) == pytest.approx(expected, rel=1e-9)


def test_warmup_stable_decay_stays_at_the_peak_and_then_falls_linearly_to_the_end() -> None:
    rates = curve(TOTAL + 1, type="warmup-stable-decay", warmup_steps=10, decay_steps=40, min_lr=1e-5)
    assert rates[9:161] == [PEAK] * 152
    assert rates[161:] == pytest.approx([PEAK - (PEAK - 1e-5) * part / 40 for part in range(1, 41)])


def test_warmup_stable_decay_falls_in_the_last_tenth_of_the_run_by_default() -> None:
    assert sum(rate < PEAK for rate in curve(type="warmup-stable-decay")) == TOTAL // 10 - 1
    assert learning_rate(TOTAL, TOTAL, PEAK, LRScheduleConfig(type="warmup-stable-decay")) == 0


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_decay_lasts_until_the_end_of_the_run_by_default(kind: str) -> None:
    assert curve(type=kind, min_lr=1e-5) == curve(type=kind, min_lr=1e-5, decay_steps=TOTAL)
    assert curve(TOTAL + 50, type=kind, min_lr=1e-5)[TOTAL:] == [1e-5] * 50


@pytest.mark.parametrize("kind", TYPES)
def test_no_step_of_a_run_has_a_learning_rate_of_zero(kind: str) -> None:
    assert min(curve(type=kind)) > 0
    assert min(curve(type=kind, warmup_steps=20)) > 0


@given(
    kind=st.sampled_from(TYPES),
    total=st.integers(1, 300),
    warmup=st.integers(0, 60),
    decay=st.none() | st.integers(61, 400),
    floor=st.floats(0, 1),
)
def test_every_schedule_rises_to_the_peak_and_then_never_rises_again_or_leaves_its_limits(
    kind: Any, total: int, warmup: int, decay: int | None, floor: float
) -> None:
    config = LRScheduleConfig(type=kind, warmup_steps=warmup, decay_steps=decay, min_lr=floor)
    rates = [learning_rate(step, total, 1.0, config) for step in range(total + 30)]
    rise, rest = rates[:warmup], rates[warmup:]
    assert rise == sorted(rise)
    assert rest == sorted(rest, reverse=True)
    assert all(0 < rate <= 1 for rate in rise)
    assert all(floor - 1e-12 <= rate <= 1 for rate in rest)
    if 0 < warmup < total:
        assert rates[warmup - 1] == 1


@pytest.mark.parametrize("kind", TYPES)
def test_no_schedule_jumps(kind: str) -> None:
    rates = curve(TOTAL + 50, type=kind, warmup_steps=50, decay_steps=150 if kind != "warmup-stable-decay" else 50)
    steepest = PEAK * max(1 / 50, math.pi / 2 / 100)
    assert max(abs(b - a) for a, b in pairwise(rates)) <= steepest * 1.0001


def test_a_run_shorter_than_its_warm_up_only_warms_up() -> None:
    config = LRScheduleConfig(warmup_steps=100)
    assert [learning_rate(step, 3, 1.0, config) for step in range(3)] == pytest.approx([0.01, 0.02, 0.03])


@pytest.mark.parametrize("kind, halfway, quarter", [("linear", 0.06, 0.035), ("cosine", 0.06, 0.01 + 0.1 * (1 - 0.5**0.5) / 2)])
def test_the_weight_decay_goes_from_its_first_to_its_final_value(kind: str, halfway: float, quarter: float) -> None:
    config = OptimizerConfig(weight_decay=0.01, final_weight_decay=0.11, weight_decay_schedule=kind)
    values = [weight_decay(step, TOTAL, config) for step in range(TOTAL + 1)]
    assert (values[0], values[TOTAL // 2], values[TOTAL]) == pytest.approx((0.01, halfway, 0.11))
    assert values[TOTAL // 4] == pytest.approx(quarter)
    assert all(before < after for before, after in pairwise(values))


def test_the_weight_decay_is_constant_without_a_final_value() -> None:
    assert {weight_decay(step, TOTAL, OptimizerConfig(weight_decay=0.3)) for step in range(TOTAL)} == {0.3}
