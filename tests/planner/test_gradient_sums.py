"""How much of the gradients' sums is not hidden: buckets against those of the engine, times against closed formulas."""

import pytest
from support.runs import Tree, tiny_config

from megagpt.config import Config
from megagpt.engine.reduction import make_buckets
from megagpt.parallel.parameter import shard_of
from megagpt.parallel.topology import Layout
from megagpt.planner.dry_run import open_dry_run
from megagpt.planner.gradient_sums import buckets, exposed_seconds, gradient_sums
from megagpt.planner.hardware import find_hardware
from megagpt.planner.stages import Stage, StageModel
from megagpt.planner.strategy import Strategy
from megagpt.planner.timing import Clock
from megagpt.planner.work import Call

T5 = {"encoder_layers": 4, "position_embedding": "relative", "relative_buckets": 8, "norm": "rmsnorm"}


def config_of(**sections: Tree) -> Config:
    model = {"n_layer": 6, "n_embd": 512, "n_head": 8, "n_positions": 64, "vocab_size": 256, **sections.pop("model", {})}
    return tiny_config(model=model, **sections)


@pytest.mark.parametrize("model", [{}, T5])
@pytest.mark.parametrize("mib", [1.0, 20.0, 1000.0])
def test_the_buckets_are_those_of_the_engine(model: Tree, mib: float) -> None:
    config = config_of(model=model, parallel={"pipeline": 2}, zero={"reduce_bucket_mib": mib})
    layout = Layout(pipeline=2)
    stages = StageModel(config).stages(Strategy.of(config, 2))
    for rank in (0, 1):
        with open_dry_run(config, layout, rank) as dry_run:
            chunk = dry_run.chunks[rank]
            own = [parameter for parameter in chunk.parameters() if shard_of(parameter).name not in dry_run.shared]
            expected = [sum(map(len_of, bucket.parameters)) for bucket in make_buckets(chunk.blocks, own, mib * 2**20)]
        assert [n_parameters for _, n_parameters in buckets(config, stages[rank]) if n_parameters] == expected


def len_of(parameter: object) -> int:
    return int(parameter.numel())  # type: ignore[attr-defined]


def summed(config: Config, network: str, gpus: int = 64) -> tuple[float, Stage, Clock, Call]:
    """Return the exposed seconds of the only stage's sums, the stage, the clock and the sums as one call."""
    strategy = Strategy.of(config, gpus)
    (stage,) = stages = StageModel(config).stages(strategy)
    clock = Clock(find_hardware("H100", network), strategy, "bf16")
    ((call,),) = gradient_sums(config, strategy, stages, [0]).by_stage
    return exposed_seconds(config, strategy, stage, [call], clock), stage, clock, call


def test_on_a_fast_network_only_the_first_block_and_the_ends_wait() -> None:
    config = config_of(zero={"reduce_bucket_mib": 1.0}, training={"micro_batch_size": 64, "global_batch_size": 4096})
    exposed, stage, clock, call = summed(config, "8x800G")
    rest = stage.own_parameters - 5 * stage.costs[1].parameters
    assert exposed == pytest.approx(clock.call_seconds(call._replace(bytes=4 * rest)))
    assert exposed < 0.4 * clock.call_seconds(call)


def test_on_a_slow_network_the_sums_are_hidden_as_far_as_the_backward_lasts() -> None:
    config = config_of(zero={"reduce_bucket_mib": 1.0}, training={"global_batch_size": 256})
    exposed, stage, clock, call = summed(config, "25GbE")
    of_block, output = clock.seconds(stage.costs[1].backward), clock.seconds(stage.costs[-1].backward)
    covered = 5 * of_block + clock.seconds(stage.costs[0].backward)  # the first bucket starts behind the last block
    n_more_calls = 5
    assert exposed == pytest.approx(clock.call_seconds(call) + n_more_calls * clock.efficiency.latency_seconds - covered)
    assert 0 < output < exposed


@pytest.mark.parametrize(
    "sections",
    [{"zero": {"stage": 0}}, {"zero": {"stage": 2, "offload_optimizer": "cpu"}}, {"zero": {"reduce_bucket_mib": 1e6}}],
)
def test_without_buckets_all_sums_wait(sections: Tree) -> None:
    exposed, _, clock, call = summed(config_of(training={"global_batch_size": 256}, **sections), "25GbE")
    assert exposed == pytest.approx(clock.call_seconds(call))


def test_schedules_with_a_split_backward_sum_at_the_end_of_a_stage() -> None:
    for schedule, hides in (("1f1b", True), ("zb_h1", False), ("zbv", False)):
        config = config_of(
            parallel={"pipeline": 2, "schedule": schedule},
            zero={"reduce_bucket_mib": 1.0},
            training={"micro_batch_size": 64, "global_batch_size": 8192},
        )
        strategy = Strategy.of(config, 64)
        stages, clock = StageModel(config).stages(strategy), Clock(find_hardware("H100"), strategy, "bf16")
        calls = gradient_sums(config, strategy, stages, [0]).by_stage[0]
        after = sum(clock.call_seconds(call) for call in calls)
        exposed = exposed_seconds(config, strategy, stages[0], calls, clock)
        assert exposed < 0.8 * after if hides else exposed == pytest.approx(after), schedule
