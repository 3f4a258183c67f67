"""Weight gradients may wait: a split backward trains as the whole one does, and runs no product twice."""

import pytest
import torch
from support.pool import Pool
from support.runs import Tree, tiny_config, train, full_weights

import megagpt.engine.engine as engine_module
from megagpt.config import Config
from megagpt.parallel import linear
from megagpt.schedules.plan import split_backward
from megagpt.schedules.registry import make_plan


def train_split(config: Config, steps: int, split: bool) -> Tree:
    """`train`, each B replaced by I and W if `split`; also counts the matrix products of weight gradients."""
    products = []
    inner = linear.accumulate_product
    engine_module.make_plan = (lambda *shape: split_backward(make_plan(*shape))) if split else make_plan
    linear.accumulate_product = lambda *arguments: (products.append(1), inner(*arguments))[1]
    try:
        return {**train(config, steps), "products": len(products)}
    finally:
        engine_module.make_plan, linear.accumulate_product = make_plan, inner


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_split_backward_gives_the_same_bits_with_as_many_products(recompute: str, ranks: Pool) -> None:
    config = tiny_config(parallel={"tensor": 2, "pipeline": 2}, zero={"stage": 2}, training={"recompute": recompute})
    whole = ranks.run(8, train_split, config, 3, False)
    split = ranks.run(8, train_split, config, 3, True)
    assert [r["products"] for r in split] == [r["products"] for r in whole]
    assert split[0]["losses"] == whole[0]["losses"]
    expected = full_weights(whole)
    assert all(torch.equal(values, expected[name]) for name, values in full_weights(split).items())
    micro_batches_per_rank, layers_per_rank = 4, 2
    assert whole[0]["products"] == 3 * micro_batches_per_rank * layers_per_rank * 4  # qkv, proj, up, down
