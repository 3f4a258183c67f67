"""Frozen weights keep their bits and cost neither gradient nor optimizer state; the others train as on one process.

Tolerances as in test_layouts.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.exhaustive import more
from support.pool import Pool
from support.products import MatrixProducts
from support.runs import (
    Tree,
    corpus,
    count_labels,
    create_engine,
    full_model,
    full_weights,
    micro_batches,
    parameters_by_name,
    run_trainer,
    tiny_config,
    train,
    train_step,
)

from megagpt.config import Config
from megagpt.engine.engine import Engine
from megagpt.errors import ConfigError
from megagpt.parallel.parameter import shard_of
from megagpt.parallel.topology import Topology
from megagpt.training.train_state import restore

SOME = ["layers.[0-1].attention.*", "layers.2.*", "embedding.position.weight"]
FIRST_HALF = ["embedding.*", "layers.[01].*"]
MATRICES = ["embedding.*", "layers.[01].*.weight"]
"""The weights of the first half, and those of its norms: only biases train there."""
STEPS = 2
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
    """Return whether `patterns` freeze a weight; by prefix and number, not by the patterns' own rules."""
    if patterns is SOME:
        return name.startswith(("layers.0.attention.", "layers.1.attention.", "layers.2.", "embedding.position"))
    first_half = name.startswith(("embedding.", "layers.0.", "layers.1."))
    return first_half and (patterns is FIRST_HALF or not name.endswith(".bias"))


def initial_weights(config: Config) -> dict[str, torch.Tensor]:
    """Return the full initial weights, without padding of the vocabulary."""
    parameters = parameters_by_name(full_model(config))
    return {name: p.detach().float()[: shard_of(p).shape[0]] for name, p in parameters.items()}


@pytest.fixture(scope="module")
def single_process(ranks: Pool) -> Any:
    """The results of one process, by patterns."""
    choices = (SOME, FIRST_HALF, MATRICES)
    return {tuple(patterns): ranks.run(1, train, tiny_config(training={"freeze": patterns}), STEPS) for patterns in choices}


USUAL = [
    ("ZeRO-1", FIRST_HALF),
    ("ZeRO-2", SOME),
    ("ZeRO-3", MATRICES),
    ("tensor 2 x pipeline 2", SOME),
    ("pipeline 2 x data 2, ZeRO-2", FIRST_HALF),
    ("zbv", FIRST_HALF),
    ("zbv", MATRICES),
]
OTHERS = [
    ("ZeRO-0", SOME),
    ("ZeRO-3", SOME),
    ("tensor 2 x pipeline 2", FIRST_HALF),
    ("pipeline 2 x data 2, ZeRO-2", MATRICES),
]


@pytest.mark.parametrize("name, patterns", [*USUAL, *more(*OTHERS)])
def test_frozen_weights_keep_their_bits_and_the_others_train_as_on_one_process(
    name: str, patterns: list[str], ranks: Pool, single_process: Any
) -> None:
    world, parallel, stage = LAYOUTS[name]
    config = tiny_config(training={"freeze": patterns}, parallel=parallel, zero={"stage": stage})
    results, reference = ranks.run(world, train, config, STEPS), single_process[tuple(patterns)]
    weights, expected, initial = full_weights(results), full_weights(reference), initial_weights(config)
    for key in expected:
        if is_frozen(key, patterns):
            assert torch.equal(weights[key], initial[key]) and torch.equal(expected[key], initial[key]), key
        else:
            torch.testing.assert_close(
                weights[key], expected[key], rtol=0, atol=5e-6, msg=lambda text, key=key: f"{key}: {text}"
            )
            assert not torch.equal(expected[key], initial[key]), f"{key} does not change"
    for result in results:
        assert result["losses"] == pytest.approx(reference[0]["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(reference[0]["norms"], rel=1e-5)


def test_the_gradient_norm_is_that_of_the_trained_weights_alone(single_process: Any) -> None:
    assert single_process[tuple(SOME)][0]["norms"][0] == pytest.approx(norm_by_autograd(tiny_config()), rel=1e-5)


def norm_by_autograd(config: Config) -> float:
    """Return the norm of all gradients except those that SOME freezes, from a model without frozen weights."""
    model = full_model(config)
    for batch in micro_batches(config, 0, 0, 1):
        model(None, batch).backward()
    gradients = {name: p.grad for name, p in parameters_by_name(model).items() if not is_frozen(name, SOME)}
    trained = [gradient.flatten() for gradient in gradients.values() if gradient is not None]
    return float(torch.cat(trained).norm()) / count_labels(config, 0)


@pytest.mark.parametrize("stage", [1, 3])
def test_frozen_bf16_weights_keep_their_bits_too(stage: int, ranks: Pool) -> None:
    config = tiny_config(training={"freeze": SOME, "precision": "bf16"}, zero={"stage": stage})
    weights, initial = full_weights(ranks.run(2, train, config, 3)), initial_weights(config)
    for name, values in weights.items():
        assert torch.equal(values, initial[name]) == is_frozen(name, SOME), name


def costs_of_a_step(config: Config) -> dict[str, int]:
    """Return what one process needs: bytes of optimizer states and fp32 weights, elements of gradients, FLOPs of products."""
    engine = create_engine(config)
    with MatrixProducts() as products:
        train_step(engine, 0)
    zero = engine.deepspeed.optimizer
    states = [value for state in zero.optimizer.state.values() for value in state.values() if value.numel() > 1]
    with engine.micro_batch_gradient(micro_batches(config, 0, 0, 1)[0], n_tokens=1):
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
        (["layers.3.mlp.*"], 2 * 128, 32),  # input gradients still go to the layers below
        (["embedding.*"], 64, 32),  # the tied output layer's weight gradient
    ],
)
def test_a_frozen_weight_has_no_gradient_no_optimizer_memory_and_no_product(
    patterns: list[str], rows: int, columns: int, ranks: Pool
) -> None:
    config = tiny_config(training={"freeze": patterns})
    (everything, some) = (ranks.run(1, costs_of_a_step, c)[0] for c in (tiny_config(), config))
    tokens = config.training.global_batch_size * config.model.n_positions
    assert everything["flops"] - some["flops"] == 2 * tokens * rows * columns
    assert some["gradients"] == some["trained"] < everything["trained"]
    for cost in (everything, some):  # DeepSpeed pads its two groups
        assert cost["bytes"] == pytest.approx(12 * cost["trained"], abs=2 * 64)


def test_the_backward_stops_above_the_frozen_first_layers(ranks: Pool) -> None:
    """Below the first trained weight there is no gradient of inputs either."""
    layers = [f"layers.{index}.*" for index in range(3)]
    (last_frozen, first_frozen) = (
        ranks.run(1, costs_of_a_step, tiny_config(training={"freeze": freeze}))[0]
        for freeze in (["layers.3.*", "embedding.*"], [*layers, "embedding.*"])
    )
    per_layer = 2 * (16 * 16) * 12 * 32 * 32  # one product with each matrix of a layer, over the batch's tokens
    # Weight gradients in three layers against one, input gradients in four against one.
    assert last_frozen["flops"] - first_frozen["flops"] == (3 - 1) * per_layer + (4 - 1) * per_layer


@pytest.mark.parametrize(
    "patterns, message",
    [
        (["layer.0.*"], r"'layer.0.\*' matches no weight of this model; the nearest is 'layers.0.\*'"),
        (["embedding.*", "embedding.tokens.weight"], "nearest is 'embedding.token.weight'"),
        (["layers.4.*"], r"'layers.4.\*' matches no weight"),
        (["*"], "every weight is frozen; leave at least one"),
    ],
)
def test_a_pattern_without_a_match_is_an_error_with_the_nearest_name(patterns: list[str], message: str) -> None:
    config = tiny_config(training={"freeze": patterns})
    with pytest.raises(ConfigError, match=message):
        Engine(config, Topology(), torch.device("cpu"))


def run_config(
    folder: Path, data: str, steps: int, freeze: list[str], layout: tuple[int, Tree, int], **sections: Tree
) -> Config:
    """Return the config of a run that saves in `folder` and resumes from there."""
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


RESUMED = [("ZeRO-3", "bf16"), ("tensor 2 x pipeline 2", "bf16"), *more(("ZeRO-0", "fp32"))]


@pytest.mark.parametrize("name, precision", RESUMED)
def test_a_run_with_frozen_weights_resumes_bit_for_bit(name: str, precision: str, ranks: Pool, tmp_path: Path) -> None:
    layout, data = LAYOUTS[name], corpus(tmp_path)

    def run(folder: str, steps: int) -> list[Tree]:
        config = run_config(tmp_path / folder, data, steps, FIRST_HALF, layout, training={"precision": precision})
        return ranks.run(layout[0], run_trainer, config)

    straight = run("a", 4)
    run("b", 2)
    resumed = run("b", 4)
    assert resumed[0]["losses"] == straight[0]["losses"]
    for result, other in zip(resumed, straight, strict=True):
        for (key, *_, values), (_, *_, expected) in zip(result["weights"], other["weights"], strict=True):
            assert np.array_equal(values, expected), key


CHANGED = [("tensor 2 x pipeline 2", "ZeRO-3"), *more(("ZeRO-2", "tensor 2 x pipeline 2"))]


@pytest.mark.parametrize("source, target", CHANGED)
def test_a_run_resumes_under_another_layout_with_other_patterns(source: str, target: str, ranks: Pool, tmp_path: Path) -> None:
    """Train everything, then freeze some weights, then others: as one process does. Frozen weights do not change."""
    data, one = corpus(tmp_path), (1, {}, 1)
    plan: list[tuple[int, list[str], Any]] = [
        (2, [], LAYOUTS[source]),
        (4, FIRST_HALF, LAYOUTS[source]),
        (6, SOME, LAYOUTS[target]),
    ]
    before: dict[str, torch.Tensor] = {}
    for steps, freeze, layout in plan:
        single = full_weights(ranks.run(1, run_trainer, run_config(tmp_path / "single", data, steps, freeze, one)))
        weights = full_weights(ranks.run(layout[0], run_trainer, run_config(tmp_path / "run", data, steps, freeze, layout)))
        for key, values in single.items():
            torch.testing.assert_close(weights[key], values, rtol=0, atol=5e-6, msg=lambda text, key=key: f"{key}: {text}")
            if freeze and is_frozen(key, freeze):
                assert torch.equal(weights[key], before[key]), key
        before = weights


def restored_second_moments(config: Config) -> dict[str, float]:
    """Return the largest second moment by name, after the checkpoint of step 2 is loaded."""
    engine = create_engine(config)
    restore(engine, Path(config.checkpoint.dir or "") / "step_00000002")
    return {
        shard_of(partition.parameter).name: float(partition.states["exp_avg_sq"].max())
        for partition in engine.zero_state().partitions()
        if partition.states and not shard_of(partition.parameter).second_copy
    }


def test_a_weight_that_is_trained_again_starts_with_moments_of_zero(ranks: Pool, tmp_path: Path) -> None:
    data, one = corpus(tmp_path), (1, {}, 1)
    ranks.run(1, run_trainer, run_config(tmp_path, data, 2, FIRST_HALF, one))
    (moments,) = ranks.run(1, restored_second_moments, run_config(tmp_path, data, 4, [], one))
    assert set(moments) == set(initial_weights(tiny_config()))
    assert {name for name, largest in moments.items() if largest == 0} == {
        name for name in moments if is_frozen(name, FIRST_HALF)
    }
