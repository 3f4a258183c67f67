"""Gradients are summed and weights gathered in buckets, beside backward and forward, with the results of one call at the end.

Tolerances as in tests/training/test_layouts.py.
"""

from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from support.encoder_decoder import T5
from support.exhaustive import chosen
from support.pool import Pool
from support.runs import Tree, compare, create_engine, full_model, local_micro_batches, tiny_config, train, train_step

from megagpt.config import Config
from megagpt.engine.reduction import make_buckets
from megagpt.parallel import linear

SMALL = 1e-4
"""MiB: each block has a bucket of its own."""
RUNS: dict[str, tuple[int, dict[str, Tree]]] = {
    "ZeRO-1": (2, {"zero": {"stage": 1}}),
    "ZeRO-2, full recompute, dropout": (
        4,
        {
            "zero": {"stage": 2},
            "training": {"recompute": "full"},
            "model": {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
        },
    ),
    "2 x 2 x 2, sequence parallel": (8, {"parallel": {"tensor": 2, "pipeline": 2, "sequence_parallel": True}}),
    "interleaved": (4, {"parallel": {"pipeline": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2}}),
    "split backward": (4, {"parallel": {"pipeline": 2, "schedule": "zb_h1"}, "zero": {"stage": 2}}),
    "frozen embeddings and first block": (2, {"training": {"freeze": ["embedding.*", "layers.0.*"]}, "zero": {"stage": 2}}),
    "encoder and decoder": (2, {"model": T5, "zero": {"stage": 2}}),
    "context 2": (2, {"parallel": {"context": 2}, "training": {"recompute": "full", "recompute_layers": 2}}),
}


def with_small_buckets(sections: dict[str, Tree]) -> Config:
    return tiny_config(**{**sections, "zero": {**sections.get("zero", {}), "reduce_bucket_mib": SMALL}})


USUAL = (
    "ZeRO-1",
    "2 x 2 x 2, sequence parallel",
    "split backward",
    "frozen embeddings and first block",
    "encoder and decoder",
)


@pytest.mark.parametrize("name", chosen(RUNS, *USUAL))
def test_buckets_do_not_change_what_is_trained(name: str, ranks: Pool) -> None:
    world, sections = RUNS[name]
    reference = {key: value for key, value in sections.items() if key not in ("parallel", "zero")}
    compare(ranks.run(world, train, with_small_buckets(sections), 2), ranks.run(1, train, tiny_config(**reference), 2))


def events_of_a_step(config: Config) -> list[str]:
    """Return the sums and the weight gradients of a step, in the order of their starts."""
    engine, events = create_engine(config), list[str]()
    start_reduce, compute = dist.reduce, linear.accumulate_product

    def reduce(*args: Any, **kwargs: Any) -> Any:
        assert kwargs["async_op"], "the sum blocks"
        events.append("sum")
        return start_reduce(*args, **kwargs)

    def product(*args: Any) -> Any:
        events.append("weight gradient")
        return compute(*args)

    with patch.object(dist, "reduce", reduce), patch.object(linear, "accumulate_product", product):
        train_step(engine, 0)
    engine.close()
    return events


def test_the_sums_of_a_block_start_before_the_products_of_the_one_before_it(ranks: Pool) -> None:
    """4 blocks with 4 matrices, 2 micro-batches a rank: after the first one, sums follow each block but the first."""
    events = ranks.run(2, events_of_a_step, with_small_buckets({}))[0]
    assert events.count("weight gradient") == 2 * 4 * 4
    first_micro_batch, rest = events[:16], events[16:]
    assert set(first_micro_batch) == {"weight gradient"}
    products_before_sums = [rest[:index].count("weight gradient") for index, event in enumerate(rest) if event == "sum"]
    assert sorted(set(products_before_sums)) == [4, 8, 12, 16]


def test_with_one_large_bucket_all_sums_follow_the_backward(ranks: Pool) -> None:
    events = ranks.run(2, events_of_a_step, tiny_config())[0]
    assert "weight gradient" not in events[events.index("sum") :]


class RecordedGather:
    """A started gather that records when it is waited for."""

    def __init__(self, work: Any, events: list[str]) -> None:
        self.work, self.events = work, events

    def wait(self) -> None:
        self.events.append("weights")
        self.work.wait()


def events_after_a_step(config: Config) -> tuple[list[str], list[str]]:
    """Return the waits for weights and the forwards of blocks: in the forward after a step, and when parameters are read."""
    engine, events = create_engine(config), list[str]()
    start_broadcast = dist.broadcast

    def broadcast(*args: Any, **kwargs: Any) -> Any:
        assert kwargs["async_op"], "the gather blocks"
        return RecordedGather(start_broadcast(*args, **kwargs), events)

    (chunk,) = engine.chunks.values()
    for number, block in enumerate(chunk.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: events.append(f"block {number}"))
    with patch.object(dist, "broadcast", broadcast):
        train_step(engine, 0)
        assert "weights" not in events, "the step waits"
        events.clear()
        engine.evaluate(local_micro_batches(config, 1, engine.topology)[:2])
        forward = events.copy()
        train_step(engine, 1)
        events.clear()
        assert len(engine.parameters) > 0
    engine.close()
    return forward, events


def test_a_block_waits_for_its_own_weights_and_a_reader_for_all(ranks: Pool) -> None:
    """4 blocks; the first one is gathered with the embeddings."""
    for forward, read in ranks.run(2, events_after_a_step, with_small_buckets({})):
        blocks = [event for event in forward if event != "weights"]
        assert blocks == 2 * ["block 0", "block 1", "block 2", "block 3"]
        assert all(forward[forward.index(block) - 1] == "weights" for block in blocks)
        assert "weights" not in forward[forward.index("block 3") :], "the second micro-batch waits again"
        assert read == forward.count("weights") * ["weights"]


def test_buckets_have_at_least_the_size_and_never_the_first_block() -> None:
    model = full_model(tiny_config(model={"n_layer": 6}))
    trained = list(model.parameters())
    of_block = sum(4 * parameter.numel() for parameter in model.blocks[0].parameters())
    buckets = make_buckets(model.blocks, trained, 1.5 * of_block)
    assert [bucket.first for bucket in buckets] == [model.blocks[4], model.blocks[2]]
    assert all(sum(4 * p.numel() for p in bucket.parameters) == 2 * of_block for bucket in buckets)
    assert make_buckets(model.blocks, trained, 100 * of_block) == []
    frozen = set(model.blocks[5].parameters())
    (bucket,) = make_buckets(model.blocks, [p for p in trained if p not in frozen], 2.5 * of_block)
    assert bucket.first is model.blocks[2] and not frozen & set(bucket.parameters)
