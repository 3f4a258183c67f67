"""The engine's step as a list: forward and backward, then an update or a discard; and what it computes beside training."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from support.pool import Pool
from support.precision import allow_fp16
from support.runs import (
    Tree,
    count_labels,
    create_engine,
    full_model,
    local_micro_batches,
    local_weights,
    micro_batches,
    parameters_by_name,
    tiny_config,
    train_step,
)
from torch import Tensor

from megagpt.config import Config
from megagpt.engine.engine import Engine
from megagpt.errors import ConfigError
from megagpt.parallel.parameter import shard_of
from megagpt.parallel.topology import Topology

DROPOUT: Tree = {"embd_pdrop": 0.2, "attn_pdrop": 0.2, "resid_pdrop": 0.2}
LAYOUTS: dict[str, tuple[int, Tree, int]] = {
    "one process": (1, {}, 1),
    "tensor 2": (2, {"tensor": 2}, 1),
    "tensor 2 x pipeline 2, sequence parallel": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 1),
    "pipeline 2 x data 2, ZeRO-0": (4, {"pipeline": 2}, 0),
    "context 2 x data 2": (4, {"context": 2}, 1),
    "zbv x data 2, ZeRO-2": (4, {"pipeline": 2, "schedule": "zbv"}, 2),
}


def config_of(name: str, **sections: Tree) -> Config:
    _, parallel, stage = LAYOUTS[name]
    return tiny_config(parallel=parallel, zero={"stage": stage}, **sections)


def sum_over_context(value: Tensor | None, engine: Engine) -> float | None:
    """Return the value summed over the ranks that share a sequence; None where there is none."""
    if value is not None and engine.topology.context_group is not None:
        dist.all_reduce(value, group=engine.topology.context_group)
    return None if value is None else float(value)


def one_step(config: Config) -> Tree:
    """Return results of one step of this rank."""
    engine = create_engine(config)
    batches, n_tokens = local_micro_batches(config, 0, engine.topology), count_labels(config, 0)
    before = local_weights(engine)
    loss_sum = engine.forward_backward(batches, n_tokens)
    unchanged = all((a[-1] == b[-1]).all() for a, b in zip(before, local_weights(engine), strict=True))
    dtype_and_shape = None if loss_sum is None else (str(loss_sum.dtype), tuple(loss_sum.shape), loss_sum.requires_grad)
    result = engine.step(1e-2)
    changed = all((a[-1] != b[-1]).any() for a, b in zip(before, local_weights(engine), strict=True))
    loss = sum_over_context(loss_sum, engine)
    engine.close()
    return {
        "place": engine.topology.coordinates,
        "loss": loss,
        "kind": dtype_and_shape,
        "unchanged": unchanged,
        "changed": changed,
        "result": result,
    }


def reference_losses(config: Config) -> list[float]:
    """Return the sum of token losses of each micro-batch of the first global batch, from the model alone."""
    model = full_model(config).eval()
    with torch.no_grad():
        return [float(model(None, batch)) for batch in micro_batches(config, 0, 0, 1)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_returns_the_sum_of_the_losses_on_the_last_stage_and_then_changes_every_weight(name: str, ranks: Pool) -> None:
    world, parallel, _ = LAYOUTS[name]
    config = config_of(name)
    losses = reference_losses(config)
    results = ranks.run(world, one_step, config)
    dp_size = 1 + max(result["place"].data for result in results)
    last_rank = 0 if parallel.get("schedule") == "zbv" else parallel.get("pipeline", 1) - 1  # of the last stage
    share = len(losses) // dp_size
    for result in results:
        assert result["unchanged"] and result["changed"]
        assert not result["result"].skipped and result["result"].loss_scale == 1.0
        if result["place"].pipeline != last_rank:
            assert result["loss"] is None
            continue
        first = result["place"].data * share
        assert result["kind"] == ("torch.float32", (), False)
        assert result["loss"] == pytest.approx(sum(losses[first : first + share]), rel=1e-5)
    norms = {result["result"].grad_norm for result in results}
    assert len(norms) == 1 and norms.pop() > 0


def gradients_of_micro_batch(config: Config) -> Tree:
    """Return the gradients of this rank's second micro-batch by name, and whether all are None before and after."""
    if config.training.precision == "fp16":
        allow_fp16()
    engine = create_engine(config)
    batch = local_micro_batches(config, 0, engine.topology)[1]
    full = micro_batches(config, 0, engine.topology.dp_rank, engine.topology.layout.data)[1]
    none_before = all(parameter.grad is None for parameter in engine.parameters)
    with engine.micro_batch_gradient(batch, int((full.labels >= 0).sum())):
        gradients = [
            (shard_of(p).name, shard_of(p).dim or 0, shard_of(p).start, p.grad.float() / engine.loss_scale)
            for p in engine.parameters
            if p.grad is not None
        ]
    none_after = all(parameter.grad is None for parameter in engine.parameters)
    _, result = train_step(engine, 0)  # the engine still works
    engine.close()
    return {
        "dp_rank": engine.topology.dp_rank,
        "gradients": gradients,
        "all": len(gradients) == len(engine.parameters),
        "none": none_before and none_after,
        "scale": result.loss_scale,
        "skipped": result.skipped,
    }


def gradients_by_autograd(config: Config, dp_rank: int, dp_size: int) -> dict[str, Tensor]:
    """Return the gradient of the mean loss of that micro-batch by name, from the model alone."""
    model, batch = full_model(config), micro_batches(config, 0, dp_rank, dp_size)[1]
    (model(None, batch) / int((batch.labels >= 0).sum())).backward()
    return {name: p.grad for name, p in parameters_by_name(model).items() if p.grad is not None}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_gradient_of_a_micro_batch_is_plain_autograd_s_on_every_rank(name: str, ranks: Pool) -> None:
    check_micro_batch_gradients(ranks.run(LAYOUTS[name][0], gradients_of_micro_batch, config_of(name)), relative=1e-5)


def test_the_gradient_of_a_micro_batch_is_scaled_under_fp16(ranks: Pool) -> None:
    config = tiny_config(training={"precision": "fp16"}, deepspeed={"fp16": {"initial_scale_power": 8}})
    results = ranks.run(2, gradients_of_micro_batch, config)
    assert [result["scale"] for result in results] == [256.0, 256.0]
    check_micro_batch_gradients(results, relative=2e-2)


def check_micro_batch_gradients(results: list[Tree], relative: float) -> None:
    dp_size = 1 + max(result["dp_rank"] for result in results)
    expected = [gradients_by_autograd(tiny_config(), dp_rank, dp_size) for dp_rank in range(dp_size)]
    for result in results:
        assert result["all"] and result["none"] and not result["skipped"]
        for name, dim, start, gradient in result["gradients"]:
            full = expected[result["dp_rank"]][name]
            length = min(gradient.shape[dim], full.shape[dim] - start)
            wanted = full.narrow(dim, start, length)
            limit = relative * full.abs().max().item()
            torch.testing.assert_close(gradient.narrow(dim, 0, length), wanted, rtol=0, atol=limit, msg=name)


def evaluations(config: Config) -> Tree:
    """Return this rank's evaluation before and after a step, and whether it left gradients."""
    engine = create_engine(config)
    batches = local_micro_batches(config, 0, engine.topology)
    before = sum_over_context(engine.evaluate(batches), engine)
    has_gradients = any(parameter.grad is not None for parameter in engine.parameters)
    _, result = train_step(engine, 1)
    after = sum_over_context(engine.evaluate(batches), engine)
    engine.close()
    place = engine.topology.coordinates
    return {"dp_rank": place.data, "before": before, "after": after, "gradients": has_gradients, "norm": result.grad_norm}


@pytest.mark.parametrize("name", ["one process", "tensor 2 x pipeline 2, sequence parallel", "zbv x data 2, ZeRO-2"])
def test_an_evaluation_has_the_plain_loss_without_dropout_or_gradients_and_does_not_disturb_training(
    name: str, ranks: Pool
) -> None:
    config = config_of(name, model=DROPOUT)
    losses = reference_losses(config)
    results = ranks.run(LAYOUTS[name][0], evaluations, config)
    share = len(losses) // (1 + max(result["dp_rank"] for result in results))
    for result in results:
        assert not result["gradients"]
        if result["before"] is not None:
            first = result["dp_rank"] * share
            assert result["before"] == pytest.approx(sum(losses[first : first + share]), rel=1e-5)
            assert abs(result["after"] - result["before"]) > 1e-2  # of the new weights
    without = ranks.run(LAYOUTS[name][0], norm_of_the_same_step, config)
    assert [result["norm"] for result in results] == without


def norm_of_the_same_step(config: Config) -> float:
    engine = create_engine(config)
    _, result = train_step(engine, 1)
    engine.close()
    return result.grad_norm


def steps_with_counts(config: Config) -> list[list[Any]]:
    """Return the weights after a step whose number of tokens is an int, and the same with tensors on the device."""
    weights = []
    for convert in (int, lambda n: torch.tensor(n, dtype=torch.float64)):
        engine = create_engine(config)
        for step, batches in enumerate((local_micro_batches(config, 0, engine.topology),) * 2):
            kept = batches[: 8 - 4 * step]  # the number of micro-batches may change, as in a batch ramp
            engine.forward_backward(kept, convert(sum(int((batch.labels >= 0).sum()) for batch in kept)))
            engine.step(1e-2)
        weights.append(local_weights(engine))
        engine.close()
    return weights


def test_the_number_of_tokens_may_be_on_the_device_and_the_number_of_micro_batches_may_change(ranks: Pool) -> None:
    ((by_int, by_tensor),) = ranks.run(1, steps_with_counts, tiny_config())
    assert all((a[-1] == b[-1]).all() for a, b in zip(by_int, by_tensor, strict=True))


def steps_without_labels(config: Config) -> list[Any]:
    engine = create_engine(config)
    before = local_weights(engine)
    batches = local_micro_batches(config, 0, engine.topology)
    masked = [type(batch)(batch.tokens, torch.full_like(batch.labels, -100)) for batch in batches]
    results = []
    for n_tokens in (0, torch.zeros((), dtype=torch.float64)):
        loss = engine.forward_backward(masked, n_tokens)
        results.append((float(loss), engine.step(0.0).grad_norm))  # type: ignore[arg-type]
    results.append(all((a[-1] == b[-1]).all() for a, b in zip(before, local_weights(engine), strict=True)))
    engine.close()
    return results


def test_a_batch_without_labels_has_zero_loss_and_zero_gradients(ranks: Pool) -> None:
    assert ranks.run(1, steps_without_labels, tiny_config(optimizer={"weight_decay": 0.0})) == [[(0, 0), (0, 0), True]]


def test_an_unresolved_schedule_is_an_error() -> None:
    config = tiny_config(parallel={"schedule": "auto"})
    with pytest.raises(ConfigError, match='parallel.schedule: "auto" must be resolved first'):
        Engine(config, Topology(), torch.device("cpu"))


def test_fp16_is_an_error_on_a_device_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some CPUs have it."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    config = tiny_config(training={"precision": "fp16"})
    with pytest.raises(ConfigError, match='training.precision: "fp16" is not supported on this device; "bf16" and "fp32" are'):
        Engine(config, Topology(), torch.device("cpu"))
