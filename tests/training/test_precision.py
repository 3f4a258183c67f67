"""bf16 and fp16: sums, master weights and moments in fp32; an overflow skips the step on every rank. On a CPU, so tiny."""

import pytest
import torch
from support.phases import PhaseObserver
from support.pool import Pool
from support.precision import allow_fp16
from support.runs import (
    Tree,
    count_labels,
    create_engine,
    create_topology,
    micro_batches,
    tiny_config,
    train,
    train_step,
)

from megagpt.config import Config
from megagpt.engine.engine import Engine


def train_half(config: Config, steps: int) -> Tree:
    allow_fp16()
    return train(config, steps)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 2])
def test_half_precision_follows_fp32(precision: str, stage: int, ranks: Pool) -> None:
    exact = ranks.run(1, train, tiny_config(), 3)
    config = tiny_config(
        training={"precision": precision},
        parallel={"pipeline": 2},
        zero={"stage": stage},
        deepspeed={"fp16": {"initial_scale_power": 8}} if precision == "fp16" else {},
    )
    results = ranks.run(4, train_half, config, 3)
    assert results[0]["losses"] == pytest.approx(exact[0]["losses"], rel=1e-2)
    assert results[0]["norms"] == pytest.approx(exact[0]["norms"], rel=3e-2)


def test_bf16_under_a_split_backward_and_two_chunks_trains_as_under_1f1b(ranks: Pool) -> None:
    """The same sums in fp32, in the same order of micro-batches: they differ only where chunks are cut."""
    plain, split = (
        ranks.run(4, train, tiny_config(training={"precision": "bf16"}, parallel={"pipeline": 2, "schedule": name}), 3)
        for name in ("1f1b", "zbv")
    )
    assert split[0]["losses"] == pytest.approx(plain[0]["losses"], rel=1e-4)
    assert split[0]["norms"] == pytest.approx(plain[0]["norms"], rel=1e-3)


def sums_of_many_gradients(config: Config) -> Tree:
    """Compare one weight's gradient over many micro-batches, as the engine sums it and as sums in bf16, with float64."""
    phase = PhaseObserver()
    engine = Engine(config, create_topology(config), torch.device("cpu"), phase)
    weight = engine.chunks[0].blocks[0].mlp.up.weight
    batches, n_tokens = micro_batches(config, 0, 0, 1), count_labels(config, 0)
    exact, in_bf16 = torch.zeros(weight.shape, dtype=torch.float64), torch.zeros_like(weight)
    for batch in batches:
        with engine.micro_batch_gradient(batch, n_tokens):
            exact += weight.grad
            in_bf16 += weight.grad.to(in_bf16.dtype)
    sums: list[torch.Tensor] = []

    def observe(name: str) -> None:
        if name == "gradient reduction of stage 0":
            sums.append(weight.grad.clone())

    phase.observe = observe
    train_step(engine, 0)
    (by_engine,) = sums

    def error(gradient: torch.Tensor) -> float:
        return float((gradient - exact).abs().mean() / exact.abs().mean())

    dtypes = (str(weight.dtype), str(by_engine.dtype))
    engine.close()
    return {"dtypes": dtypes, "engine": error(by_engine), "bf16": error(in_bf16)}


def test_micro_batches_add_up_in_fp32_where_bf16_sums_drift(ranks: Pool) -> None:
    many: Tree = {"training": {"global_batch_size": 64, "micro_batch_size": 1, "precision": "bf16"}}
    (result,) = ranks.run(1, sums_of_many_gradients, tiny_config(**many))
    assert result["dtypes"] == ("torch.bfloat16", "torch.float32")
    assert result["engine"] < 1e-6 and result["bf16"] > 1e-3


def overflow_on_one_rank(config: Config) -> Tree:
    """Run a step in which the gradients of rank 0 are infinite; return whether it is skipped and no weight changes."""
    allow_fp16()
    engine = create_engine(config)
    before = [p.detach().clone() for p in engine.parameters]
    if engine.topology.rank == 0:
        block = engine.chunks[0].blocks[0]
        block.register_forward_hook(lambda *call: call[2].register_hook(lambda gradient: gradient * float("inf")) and None)
    _, result = train_step(engine, 0)
    same = all(torch.equal(old, new) for old, new in zip(before, engine.parameters, strict=True))
    return {"skipped": result.skipped, "same": same}


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: Pool) -> None:
    config = tiny_config(
        training={"precision": "fp16"}, parallel={"pipeline": 2}, deepspeed={"fp16": {"initial_scale_power": 8}}
    )
    for result in ranks.run(4, overflow_on_one_rank, config):
        assert result == {"skipped": True, "same": True}


def test_a_loss_that_is_nan_is_reported_as_nan(ranks: Pool) -> None:
    (result,) = ranks.run(1, train, tiny_config(model={"init_std": 1e30}), 1)
    assert result["losses"][0] != result["losses"][0]


def test_an_offloaded_optimizer_trains_the_same(ranks: Pool) -> None:
    plain = ranks.run(2, train, tiny_config(), 3)
    offloaded = ranks.run(2, train, tiny_config(zero={"stage": 2, "offload_optimizer": "cpu"}), 3)
    assert offloaded[0]["losses"] == pytest.approx(plain[0]["losses"], rel=1e-5)
