"""What the host does in a step has a bound: operators of the optimizer step and of a layer, and reads from the device."""

from collections import Counter
from typing import Any

import pytest
from support.pool import Pool
from support.runs import count_labels, create_engine, local_micro_batches, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt.config import Config

READ = "_local_scalar_dense"
"""The operator that moves one number from the device to the host."""


class Operators(TorchDispatchMode):
    """Counts the operators that run inside a `with` block, except views and the like, which start nothing on a device."""

    FREE = ("view", "_unsafe_view", "detach", "alias", "slice", "select", "split", "t", "transpose", "expand", "unbind")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in self.FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def work_of_a_step(config: Config) -> tuple[Counter[str], Counter[str]]:
    """Return the operators of forward and backward, and of the optimizer step, of the second step."""
    engine = create_engine(config)
    for step in range(2):
        batches, n_tokens = local_micro_batches(config, step, engine.topology), count_labels(config, step)
        with Operators() as passes:
            engine.forward_backward(batches, n_tokens)
        with Operators() as update:
            engine.step(1e-3)
    engine.close()
    return passes.counts, update.counts


def with_layers(n_layer: int, **sections: Any) -> Config:
    return tiny_config(model={"n_layer": n_layer}, **sections)


@pytest.mark.parametrize("ranks_of_zero, stage", [(1, 0), (2, 1), (2, 2)])
def test_the_optimizer_step_is_as_many_operators_for_any_number_of_weights(ranks_of_zero: int, stage: int, ranks: Pool) -> None:
    counts = []
    for n_layer in (2, 4):
        config = with_layers(n_layer, zero={"stage": stage})
        counts.append(ranks.run(ranks_of_zero, work_of_a_step, config)[0][1])
    assert counts[0].total() == counts[1].total() <= 40
    assert counts[0][READ] <= 1  # the norm


def test_a_layer_of_one_micro_batch_is_at_most_70_operators(ranks: Pool) -> None:
    config = with_layers(2)
    (few, _), (many, _) = (ranks.run(1, work_of_a_step, with_layers(n_layer))[0] for n_layer in (2, 4))
    n_micro_batches = config.training.global_batch_size // config.training.micro_batch_size
    per_layer = (many.total() - few.total()) / 2 / n_micro_batches
    assert 20 < per_layer <= 70  # eager: forward about 25, backward about 40
    assert many[READ] == few[READ] == 0  # forward and backward never wait for the device
