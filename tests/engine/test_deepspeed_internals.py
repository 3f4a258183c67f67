"""DeepSpeed has every part that megagpt uses, a missing one is named at start, and discarded gradients leave no trace."""

from typing import Any

import pytest
import torch
from support.exhaustive import EXHAUSTIVE, chosen
from support.pool import Pool
from support.precision import allow_fp16
from support.runs import (
    Tree,
    count_labels,
    create_engine,
    create_topology,
    local_micro_batches,
    local_weights,
    tiny_config,
    train_step,
)

from megagpt.config import Config
from megagpt.engine import deepspeed_internals
from megagpt.engine.deepspeed_internals import check_internals, mark_for_gradient_norm
from megagpt.engine.engine import Engine
from megagpt.errors import ConfigError
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import mark_second_copy, replicated_parameter, shard_of, sharded_parameter
from megagpt.planner.collective_counter import CollectiveCounter

ENGINE, OPTIMIZER = deepspeed_internals.ENGINE_ATTRIBUTES, deepspeed_internals.OPTIMIZER_ATTRIBUTES
STAGE_1_AND_2, STAGE_3 = deepspeed_internals.STAGE_1_AND_2_ATTRIBUTES, deepspeed_internals.STAGE_3_ATTRIBUTES
PARAMETER, STAGE_3_PARAMETER = deepspeed_internals.PARAMETER_ATTRIBUTES, deepspeed_internals.STAGE_3_PARAMETER_ATTRIBUTES


class Without:
    """An object that lacks one attribute of the object behind it."""

    def __init__(self, target: Any, missing: str, **replaced: Any) -> None:
        self.__dict__ |= {"target": target, "missing": missing, **replaced}

    def __getattr__(self, name: str) -> Any:
        if name == self.__dict__["missing"]:
            raise AttributeError(name)
        return getattr(self.__dict__["target"], name)


def errors_by_attribute(config: Config) -> dict[str, str]:
    """Return the error of the check for each attribute that is missing, by "owner.attribute"; "" if there is no error."""
    engine = create_engine(config)
    real, parameters = engine.deepspeed, engine.parameters

    def error_of(deepspeed: Any, first_parameter: Any) -> str:
        try:
            check_internals(deepspeed, [first_parameter])
        except ConfigError as error:
            return str(error)
        return ""

    errors = {"nothing": error_of(real, parameters[0])}
    for name in ENGINE:
        errors[f"engine.{name}"] = error_of(Without(real, name), parameters[0])
    for name in {*OPTIMIZER, *STAGE_1_AND_2, *STAGE_3}:
        partial = Without(real, "", optimizer=Without(real.optimizer, name))
        errors[f"optimizer.{name}"] = error_of(partial, parameters[0])
    for name in (*PARAMETER, *STAGE_3_PARAMETER):
        errors[f"parameter.{name}"] = error_of(real, Without(parameters[0], name))
    engine.close()
    return errors


def broadcasts_of_a_start(config: Config) -> tuple[int, bool]:
    """Return how many broadcasts create an engine, and whether a parameter keeps the mark that avoids them."""
    topology = create_topology(config)
    with CollectiveCounter(topology) as counter:
        engine = Engine(config, topology, torch.device("cpu"))
    marked = any(hasattr(parameter, "ds_optim_param") for parameter in engine.parameters)
    engine.close()
    return sum(calls for key, calls in counter.calls.items() if key.call == "broadcast"), marked


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_no_weight_is_sent_at_the_start_because_all_ranks_draw_the_same(stage: int, ranks: Pool) -> None:
    assert ranks.run(2, broadcasts_of_a_start, tiny_config(zero={"stage": stage})) == [(0, False)] * 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_installed_deepspeed_has_every_part_and_a_missing_one_is_named(stage: int, ranks: Pool) -> None:
    required = {f"engine.{name}" for name in ENGINE}
    required |= {f"optimizer.{name}" for name in (*OPTIMIZER, *(STAGE_3 if stage == 3 else STAGE_1_AND_2))}
    required |= {f"parameter.{name}" for name in (STAGE_3_PARAMETER if stage == 3 else PARAMETER)}
    for errors in ranks.run(2, errors_by_attribute, tiny_config(zero={"stage": stage})):
        assert errors["nothing"] == ""
        assert {name for name, error in errors.items() if error} == required
        for name in required:
            attribute = name.split(".")[1]
            assert f"has no Without.{attribute}, which megagpt needs; install deepspeed 0.19" in errors[name]


def test_shards_and_second_copies_are_marked_for_deepspeeds_gradient_norm() -> None:
    for tp_size in (1, 2):
        parallel = ParallelContext(tp_rank=0, tp_size=tp_size)
        shard, replicated, copy = (
            sharded_parameter("a", (4, 4), 0, parallel, 1.0),
            replicated_parameter("b", (4,), parallel),
            sharded_parameter("c", (4, 4), 0, parallel, 1.0),
        )
        mark_second_copy(copy)
        mark_for_gradient_norm([shard, replicated, copy], tp_size)
        split = [getattr(parameter, "model_parallel", False) for parameter in (shard, replicated, copy)]
        assert split == [tp_size > 1, False, tp_size > 1]
        copies = [getattr(parameter, "ds_pipe_replicated", False) for parameter in (shard, replicated, copy)]
        assert copies == [False, False, True]


def forward_backward(engine: Engine, step: int) -> None:
    batches = local_micro_batches(engine.config, step, engine.topology)
    engine.forward_backward(batches, count_labels(engine.config, step))


def weights_with_discards(config: Config, discards: int) -> Tree:
    """Return this rank's weights after three steps, before the second and third of which a batch is discarded."""
    if config.training.precision == "fp16":
        allow_fp16()
    engine = create_engine(config)
    norms, scales = [], [engine.loss_scale]
    for step in range(3):
        for number in range(discards if step > 0 else 0):
            before = local_weights(engine)
            forward_backward(engine, 10 + number)
            result = engine.discard()
            assert result.skipped and result.grad_norm != result.grad_norm and result.loss_scale == engine.loss_scale
            assert all((a[-1] == b[-1]).all() for a, b in zip(before, local_weights(engine), strict=True))
        _, result = train_step(engine, step)
        assert not result.skipped
        norms.append(result.grad_norm)
        scales.append(result.loss_scale)
    state = {
        (shard_of(partition.parameter).name, name): values.clone()
        for partition in engine.zero_state().partitions()
        for name, values in partition.states.items()
    }
    weights = local_weights(engine)
    engine.close()
    return {"weights": weights, "norms": norms, "scales": scales, "state": state}


CASES: dict[str, Tree] = {
    "ZeRO-0": {"zero": {"stage": 0}},
    "ZeRO-1": {"zero": {"stage": 1}},
    "ZeRO-2": {"zero": {"stage": 2}},
    "ZeRO-3": {"zero": {"stage": 3}},
    "ZeRO-2, optimizer offloaded": {"zero": {"stage": 2, "offload_optimizer": "cpu"}},
    "ZeRO-3, optimizer offloaded": {"zero": {"stage": 3, "offload_optimizer": "cpu"}},
    "fp16, ZeRO-1": {"training": {"precision": "fp16"}, "deepspeed": {"fp16": {"initial_scale_power": 8}}},
    "zbv, ZeRO-2": {"zero": {"stage": 2}, "parallel": {"pipeline": 2, "schedule": "zbv"}},
}


@pytest.mark.parametrize(
    "name", chosen(CASES, "ZeRO-2", "ZeRO-3", "ZeRO-2, optimizer offloaded", "fp16, ZeRO-1", "zbv, ZeRO-2")
)
def test_discarded_gradients_leave_the_same_bits_in_all_later_steps(name: str, ranks: Pool) -> None:
    config = tiny_config(**CASES[name])
    config = config.model_copy(update={"training": config.training.model_copy(update={"global_batch_size": 8})})
    plain, discarded = ranks.run(2, weights_with_discards, config, 0), ranks.run(2, weights_with_discards, config, 2)
    for result, other in zip(plain, discarded, strict=True):
        assert result["norms"] == other["norms"] and result["scales"] == other["scales"]
        assert all(torch.equal(values, other["state"][key]) for key, values in result["state"].items())
        for (key, *_, values), (_, *_, expected) in zip(result["weights"], other["weights"], strict=True):
            assert (values == expected).all(), key


def losses_before_training_and_after_a_rollback(config: Config) -> tuple[float, float]:
    """Return an evaluation of the initial weights, and the same after training, a discard and a return to these weights."""
    engine = create_engine(config)
    zero, batches = engine.zero_state(), local_micro_batches(config, 0, engine.topology)
    initial = [partition.master.clone() for partition in zero.partitions()]
    parameters = [parameter.detach().clone() for parameter in engine.parameters]  # empty under ZeRO-3
    losses = [engine.evaluate(batches)]
    train_step(engine, 0)
    forward_backward(engine, 1)
    engine.discard()
    for partition, values in zip(zero.partitions(), initial, strict=True):
        zero.set_weights(partition, values)
    if config.zero.stage < 3:
        for parameter, values in zip(engine.parameters, parameters, strict=True):
            parameter.data.copy_(values)
    losses.append(engine.evaluate(batches))
    engine.close()
    first, second = (float(loss) for loss in losses if loss is not None)
    return first, second


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_that_are_loaded_after_a_discard_are_used_at_once(stage: int, ranks: Pool) -> None:
    for before, after in ranks.run(2, losses_before_training_and_after_a_rollback, tiny_config(zero={"stage": stage})):
        assert after == before


def state_before_and_after_a_step(config: Config) -> Tree:
    engine = create_engine(config)
    zero = engine.zero_state()
    before = {name: float(values.abs().sum()) for p in zero.partitions() for name, values in p.states.items()}
    steps = [zero.step]
    for step in range(2):
        train_step(engine, step)
        steps.append(zero.step)
    after = {name: float(values.abs().sum()) for p in zero.partitions() for name, values in p.states.items()}
    zero.step = 7
    steps.append(zero.step)
    masters = []
    for partition in zero.partitions() if config.zero.stage < 3 else ():
        values = partition.parameter.detach().flatten()[partition.start : partition.start + len(partition.master)]
        masters.append(torch.equal(partition.master, values))
    engine.close()
    return {"before": before, "after": after, "steps": steps, "masters": all(masters)}


@pytest.mark.parametrize("stage", [0, 1, 2, 3] if EXHAUSTIVE else [1, 3])
@pytest.mark.parametrize(
    "optimizer, names",
    [
        ({"type": "adamw"}, {"exp_avg", "exp_avg_sq"}),
        ({"type": "sgd", "momentum": 0.9}, {"momentum_buffer"}),
        ({"type": "sgd"}, set()),
    ],
)
def test_optimizer_states_are_zeros_before_the_first_step_and_the_optimizer_s_own_after_it(
    stage: int, optimizer: Tree, names: set[str], ranks: Pool
) -> None:
    for result in ranks.run(2, state_before_and_after_a_step, tiny_config(optimizer=optimizer, zero={"stage": stage})):
        assert set(result["before"]) == set(result["after"]) == names
        assert not any(result["before"].values())
        assert all(total > 0 for total in result["after"].values())
        assert result["masters"]
        assert result["steps"] == ([0, 1, 2, 7] if optimizer["type"] == "adamw" else [0, 0, 0, 0])
