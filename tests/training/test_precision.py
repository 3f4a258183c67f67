"""bf16 and fp16: fp32 sums, masters and moments; overflow skips the step on every rank. CPU only, so tiny."""

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from support.pool import Pool
from support.runs import Tree, micro_batches, tiny_config, train

from megagpt.config import Config
from megagpt.engine.engine import Engine
from megagpt.parallel.topology import Topology


def allow_fp16() -> None:
    """DeepSpeed refuses fp16 on a CPU, where it is merely slow."""
    get_accelerator().is_fp16_supported = lambda: True


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


def test_bf16_under_a_split_backward_and_two_chunks_is_that_of_1f1b(ranks: Pool) -> None:
    """The same sums in fp32, in the same order of micro-batches: the same bits but for where chunks are cut."""
    plain, split = (
        ranks.run(4, train, tiny_config(training={"precision": "bf16"}, parallel={"pipeline": 2, "schedule": name}), 3)
        for name in ("1f1b", "zbv")
    )
    assert split[0]["losses"] == pytest.approx(plain[0]["losses"], rel=1e-4)
    assert split[0]["norms"] == pytest.approx(plain[0]["norms"], rel=1e-3)


def sums_of_many(config: Config) -> Tree:
    """One weight's gradient over many micro-batches: as the engine sums it, in float64, and as sums in bf16 would have it."""
    engine = Engine(config, Topology.create(1, 1), torch.device("cpu"))
    weight, scale = engine.chunks[0].layers["0"].mlp.up.weight, torch.tensor(1.0 / count_labels(config, 0))
    with engine.deepspeed.coalesce_grad_reduction():
        for batch in micro_batches(config, 0, 0, 1):
            engine.chunks[0](None, batch).backward(scale)
        ours = weight.grad.clone()
        exact, naive = torch.zeros_like(ours, dtype=torch.float64), torch.zeros_like(weight)
        for batch in micro_batches(config, 0, 0, 1):
            weight.grad = None
            engine.chunks[0](None, batch).backward(scale)
            exact += weight.grad
            naive += weight.grad.to(naive.dtype)
    size = exact.abs().mean()
    errors = {name: float((sum_ - exact).abs().mean() / size) for name, sum_ in {"ours": ours, "naive": naive}.items()}
    return {"dtype": str(ours.dtype), "weights": str(weight.dtype), **errors}


def test_micro_batches_add_up_in_fp32_where_bf16_sums_drift(ranks: Pool) -> None:
    many: Tree = {"training": {"global_batch_size": 64, "micro_batch_size": 1, "precision": "bf16"}}
    (result,) = ranks.run(1, sums_of_many, tiny_config(**many))
    assert (result["weights"], result["dtype"]) == ("torch.bfloat16", "torch.float32")
    assert result["ours"] < 1e-6 and result["naive"] > 1e-3


def overflow_on_one_rank(config: Config) -> Tree:
    allow_fp16()
    topology = Topology.create(config.parallel.tensor, config.parallel.pipeline)
    engine = Engine(config, topology, torch.device("cpu"))
    before = [p.detach().clone() for p in engine.parameters]
    if topology.rank == 0:
        block = engine.chunks[0].layers["0"]
        block.register_forward_hook(lambda *call: call[2].register_hook(lambda gradient: gradient * float("inf")) and None)
    skipped = engine.train_step(
        micro_batches(config, 0, topology.dp_cp_rank, topology.layout.dp_cp), count_labels(config, 0), 0.1
    )
    same = all(torch.equal(old, new) for old, new in zip(before, engine.parameters, strict=True))
    return {"skipped": skipped.skipped, "same": same}


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: Pool) -> None:
    config = tiny_config(
        training={"precision": "fp16"}, parallel={"pipeline": 2}, deepspeed={"fp16": {"initial_scale_power": 8}}
    )
    for result in ranks.run(4, overflow_on_one_rank, config):
        assert result == {"skipped": True, "same": True}


def test_a_nan_loss_is_nan(ranks: Pool) -> None:
    (result,) = ranks.run(1, train, tiny_config(model={"init_std": 1e30}), 1)
    assert result["losses"][0] != result["losses"][0]


def test_offloaded_optimizer_gives_the_same_run(ranks: Pool) -> None:
    plain = ranks.run(2, train, tiny_config(), 3)
    offloaded = ranks.run(2, train, tiny_config(zero={"stage": 2, "offload_optimizer": "cpu"}), 3)
    assert offloaded[0]["losses"] == pytest.approx(plain[0]["losses"], rel=1e-5)
