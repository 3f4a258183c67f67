"""Frozen weights keep their bits and cost neither gradient nor optimizer state; the others train as without a layout.

Tolerances as in test_layouts.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pool import Pool
from support.runs import Tree, corpus, micro_batches, run_trainer, tiny_config, train, full_weights
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt.config import Config
from megagpt.engine.engine import Engine
from megagpt.engine.freezing import parameter_names
from megagpt.errors import ConfigError
from megagpt.model.gpt import build_chunk
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.parameter import ParallelContext, is_second_copy, shard_of
from megagpt.parallel.topology import Topology

SOME = ["layers.[0-1].attention.*", "layers.2.*", "embedding.position.weight"]
FIRST_HALF = ["embedding.*", "layers.[01].*"]
MATRICES = ["embedding.*", "layers.[01].*.weight"]
"""Of the first half, and the gains of its norms: only biases train there."""
LAYOUTS: dict[str, tuple[int, Tree, int]] = {
    "ZeRO-0": (2, {}, 0),
    "ZeRO-1": (2, {}, 1),
    "ZeRO-2": (2, {}, 2),
    "ZeRO-3": (2, {}, 3),
    "tensor 2 x pipeline 2": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 1),
    "pipeline 2 x data 2, ZeRO-2": (4, {"pipeline": 2}, 2),
    "zbv": (2, {"pipeline": 2, "schedule": "zbv"}, 1),
}


def is_frozen(name: str, patterns: list[str]) -> bool:
    """By prefix and number, not by the patterns' own rules."""
    if patterns is SOME:
        return name.startswith(("layers.0.attention.", "layers.1.attention.", "layers.2.", "embedding.position"))
    first_half = name.startswith(("embedding.", "layers.0.", "layers.1."))
    return first_half and (patterns is FIRST_HALF or not name.endswith(".bias"))


def initial(config: Config) -> dict[str, torch.Tensor]:
    chunk = build_chunk(config, ParallelContext(DeferredGradients()), range(config.model.n_layer))
    return {shard_of(p).name: p.detach().float()[: shard_of(p).shape[0]] for p in chunk.parameters()}


@pytest.fixture(scope="module")
def alone(ranks: Pool) -> Any:
    """The single process, by patterns."""
    choices = (SOME, FIRST_HALF, MATRICES)
    return {tuple(patterns): ranks.run(1, train, tiny_config(training={"freeze": patterns}), 5) for patterns in choices}


@pytest.mark.parametrize(
    "name, patterns",
    [
        ("ZeRO-0", SOME),
        ("ZeRO-1", FIRST_HALF),
        ("ZeRO-2", SOME),
        ("ZeRO-3", SOME),
        ("ZeRO-3", MATRICES),
        ("tensor 2 x pipeline 2", SOME),
        ("tensor 2 x pipeline 2", FIRST_HALF),
        ("pipeline 2 x data 2, ZeRO-2", FIRST_HALF),
        ("pipeline 2 x data 2, ZeRO-2", MATRICES),
        ("zbv", FIRST_HALF),
        ("zbv", MATRICES),
    ],
)
def test_frozen_weights_keep_their_bits_and_the_others_train_alike(
    name: str, patterns: list[str], ranks: Pool, alone: Any
) -> None:
    world, parallel, stage = LAYOUTS[name]
    config = tiny_config(training={"freeze": patterns}, parallel=parallel, zero={"stage": stage})
    results, reference = ranks.run(world, train, config, 5), alone[tuple(patterns)]
    weights, expected, begun = full_weights(results), full_weights(reference), initial(config)
    for key in expected:
        if is_frozen(key, patterns):
            assert torch.equal(weights[key], begun[key]) and torch.equal(expected[key], begun[key]), key
        else:
            torch.testing.assert_close(
                weights[key], expected[key], rtol=0, atol=5e-6, msg=lambda text, key=key: f"{key}: {text}"
            )
            assert not torch.equal(expected[key], begun[key]), f"{key} stands still"
    for result in results:
        assert result["losses"] == pytest.approx(reference[0]["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(reference[0]["norms"], rel=1e-5)


def test_the_norm_is_that_of_the_trained_weights_alone(ranks: Pool, alone: Any) -> None:
    (norm,) = ranks.run(1, norm_by_autograd, tiny_config())
    assert alone[tuple(SOME)][0]["norms"][0] == pytest.approx(norm, rel=1e-5)


def norm_by_autograd(config: Config) -> float:
    """Of everything but what SOME freezes, with nothing frozen."""
    chunk = build_chunk(config, ParallelContext(DeferredGradients()), range(config.model.n_layer))
    for batch in micro_batches(config, 0, 0, 1):
        chunk(None, batch).backward()
    kept = [p.grad for p in chunk.parameters() if not is_frozen(shard_of(p).name, SOME) and p.grad is not None]
    return float(torch.cat([gradient.flatten() for gradient in kept]).norm()) / count_labels(config, 0)


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_keeps_the_bits_too(stage: int, ranks: Pool) -> None:
    config = tiny_config(training={"freeze": SOME, "precision": "bf16"}, zero={"stage": stage})
    weights, begun = full_weights(ranks.run(2, train, config, 3)), initial(config)
    for name, values in weights.items():
        assert torch.equal(values, begun[name]) == is_frozen(name, SOME), name


class Products(TorchDispatchMode):
    """Multiplications and additions of all matrix products in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def costs(config: Config) -> dict[str, int]:
    """Of one process: bytes of the optimizer's state and masters, numbers that have gradients, work of a step's products."""
    engine = Engine(config, Topology.create(1, 1), torch.device("cpu"))
    batches = micro_batches(config, 0, 0, 1)
    with Products() as products:
        engine.train_step(batches, count_labels(config, 0), 0.01)
    zero = engine.deepspeed.optimizer
    states = [value for state in zero.optimizer.state.values() for value in state.values() if value.numel() > 1]
    engine._reduction.begin()
    for batch in batches[:1]:
        engine.chunks[0](None, batch).backward()
    gradients = sum(p.grad.numel() for p in engine.parameters if p.grad is not None)
    trained = sum(p.numel() for p in engine.parameters if p.requires_grad)
    return {
        "bytes": sum(t.numel() * t.element_size() for t in [*states, *zero.single_partition_of_fp32_groups]),
        "gradients": gradients,
        "trained": trained,
        "flops": products.flops,
    }


@pytest.mark.parametrize(
    "patterns, rows, columns",
    [
        (["layers.3.mlp.*"], 2 * 128, 32),  # input gradients flow on to the layers below
        (["embedding.*"], 64, 32),  # the tied output layer's weight gradient
    ],
)
def test_no_gradient_no_optimizer_memory_and_no_product(patterns: list[str], rows: int, columns: int, ranks: Pool) -> None:
    config = tiny_config(training={"freeze": patterns})
    (all_, some) = (ranks.run(1, costs, c)[0] for c in (tiny_config(), config))
    tokens = config.training.global_batch_size * config.model.n_positions
    assert all_["flops"] - some["flops"] == 2 * tokens * rows * columns
    assert some["gradients"] == some["trained"] < all_["trained"]
    for cost in (all_, some):  # DeepSpeed pads its two groups
        assert cost["bytes"] == pytest.approx(12 * cost["trained"], abs=2 * 64)


def test_a_frozen_beginning_is_left_out_of_the_backward(ranks: Pool) -> None:
    """Nothing below the first trained weight: no gradient of inputs either."""
    layers = [f"layers.{index}.*" for index in range(3)]
    (all_, some) = (
        ranks.run(1, costs, tiny_config(training={"freeze": freeze}))[0]
        for freeze in (["layers.3.*", "embedding.*"], [*layers, "embedding.*"])
    )
    per_layer = 2 * (16 * 16) * 12 * 32 * 32  # of one product with each matrix of a layer, over the batch's tokens
    # Weights have gradients in three layers against one, inputs in four against one.
    assert all_["flops"] - some["flops"] == (3 - 1) * per_layer + (4 - 1) * per_layer


@pytest.mark.parametrize(
    "patterns, message",
    [
        (["layer.0.*"], r"'layer.0.\*' is no weight of this model; the nearest is 'layers.0.\*'"),
        (["embedding.*", "embedding.tokens.weight"], "nearest is 'embedding.token.weight'"),
        (["layers.4.*"], r"'layers.4.\*' is no weight"),
        (["*"], "every weight is frozen; leave at least one"),
    ],
)
def test_a_pattern_without_a_match_is_refused_with_the_nearest(patterns: list[str], message: str) -> None:
    config = tiny_config(training={"freeze": patterns})
    with pytest.raises(ConfigError, match=message):
        Engine(config, Topology.single(), torch.device("cpu"))


def test_the_names_are_those_of_the_model() -> None:
    for tied in (True, False):
        config = tiny_config(model={"tie_embeddings": tied})
        assert parameter_names(config) == list(initial(config))


def run_config(
    folder: Path, data: str, steps: int, freeze: list[str], layout: tuple[int, Tree, int], **sections: Tree
) -> Config:
    _, parallel, stage = layout
    tree: Tree = {
        "data": {"train": data},
        "training": {"steps": steps, "global_batch_size": 8, "freeze": freeze},
        "lr_schedule": {"decay_steps": 20},
        "checkpoint": {"dir": str(folder / "checkpoints")},
        "logging": {"interval": 1, "metrics_file": str(folder / "metrics.jsonl")},
    }
    tree["training"] |= sections.pop("training", {})
    return tiny_config(parallel=parallel, zero={"stage": stage}, **{**tree, **sections})


@pytest.mark.parametrize("name, precision", [("ZeRO-0", "fp32"), ("ZeRO-3", "bf16"), ("tensor 2 x pipeline 2", "bf16")])
def test_a_run_with_frozen_weights_resumes_bit_for_bit(name: str, precision: str, ranks: Pool, tmp_path: Path) -> None:
    layout, data, kept = LAYOUTS[name], corpus(tmp_path), {"precision": precision}
    straight = ranks.run(layout[0], run_trainer, run_config(tmp_path / "a", data, 4, FIRST_HALF, layout, training=kept))
    ranks.run(layout[0], run_trainer, run_config(tmp_path / "b", data, 2, FIRST_HALF, layout, training=kept))
    halves = ranks.run(layout[0], run_trainer, run_config(tmp_path / "b", data, 4, FIRST_HALF, layout, training=kept))
    assert halves[0]["losses"] == straight[0]["losses"]
    for result, other in zip(halves, straight, strict=True):
        for (key, *_, values), (_, *_, wanted) in zip(result["weights"], other["weights"], strict=True):
            assert np.array_equal(values, wanted), key


@pytest.mark.parametrize("source, target", [("ZeRO-2", "tensor 2 x pipeline 2"), ("tensor 2 x pipeline 2", "ZeRO-3")])
def test_a_run_goes_on_under_another_layout_with_other_patterns(source: str, target: str, ranks: Pool, tmp_path: Path) -> None:
    """Train all, then with some frozen, then with others: as one process does; what has been frozen has not moved."""
    data, one = corpus(tmp_path), (1, {}, 1)
    plan: list[tuple[int, list[str], Any, Any]] = [
        (2, [], one, LAYOUTS[source]),
        (4, FIRST_HALF, one, LAYOUTS[source]),
        (6, SOME, one, LAYOUTS[target]),
    ]
    before: dict[str, torch.Tensor] = {}
    for steps, freeze, single, layout in plan:
        alone = full_weights(ranks.run(1, run_trainer, run_config(tmp_path / "alone", data, steps, freeze, single)))
        weights = full_weights(ranks.run(layout[0], run_trainer, run_config(tmp_path / "run", data, steps, freeze, layout)))
        for key, values in alone.items():
            torch.testing.assert_close(weights[key], values, rtol=0, atol=5e-6, msg=lambda text, key=key: f"{key}: {text}")
            if freeze and is_frozen(key, freeze):
                assert torch.equal(weights[key], before[key]), key
        before = weights


def second_moments(config: Config) -> Tree:
    """Largest second moment by name, after the resumption that the config asks for."""
    from megagpt.training import train_state as snapshot

    engine = Engine(config, Topology.create(1, 1), torch.device("cpu"))
    snapshot.restore(engine, Path(config.checkpoint.dir or "") / "step_00000002")
    fragments = snapshot._zero_state(engine).partitions()
    return {
        shard_of(f.parameter).name: float(f.moments["exp_avg_sq"].max())
        for f in fragments
        if f.moments and not is_second_copy(f.parameter)
    }


def test_what_is_trained_again_begins_with_moments_of_zero(ranks: Pool, tmp_path: Path) -> None:
    data, one = corpus(tmp_path), (1, {}, 1)
    ranks.run(1, run_trainer, run_config(tmp_path, data, 2, FIRST_HALF, one))
    (moments,) = ranks.run(1, second_moments, run_config(tmp_path, data, 4, [], one))
    assert set(moments) == set(parameter_names(tiny_config()))
    assert {name for name, largest in moments.items() if largest == 0} == {
        name for name in moments if is_frozen(name, FIRST_HALF)
    }
