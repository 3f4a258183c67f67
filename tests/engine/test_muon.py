"""Muon: singular values near 1, the published update, and the same weights under every layout as in one process."""

from pathlib import Path

import pytest
import torch
from support.exhaustive import EXHAUSTIVE
from support.pool import Pool
from support.runs import Tree, compare, corpus, full_weights, run_trainer, tiny_config, train
from torch import nn

from megagpt.checkpoint.boxes import Box, Piece
from megagpt.config.schema import OptimizerConfig
from megagpt.engine.muon import Muon, Segment, orthogonalized
from megagpt.engine.optimizer import Group, build_optimizer, set_group
from megagpt.errors import ConfigError
from megagpt.parallel.parameter import Shard

LAYOUTS: dict[str, tuple[int, Tree, int]] = {
    "data 2, ZeRO-0": (2, {}, 0),
    "data 4, ZeRO-1": (4, {}, 1),
    "data 2, ZeRO-2": (2, {}, 2),
    "tensor 4": (4, {"tensor": 4}, 1),
    "tensor 2 x pipeline 2 x data 2": (8, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 1),
    "context 2 x tensor 2, ZeRO-2": (4, {"context": 2, "tensor": 2}, 2),
}
MODELS: dict[str, Tree] = {
    "GPT-2": {},
    "LLaMA": {
        "n_kv_head": 1,
        "gated_mlp": True,
        "norm": "rmsnorm",
        "position_embedding": "rotary",
        "tie_embeddings": False,
        "qkv_bias": False,
    },
}


@pytest.mark.parametrize("shape", [(8, 8), (20, 6), (6, 20), (2, 12, 8)])
def test_singular_values_are_moved_near_one(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    values = torch.linalg.svdvals(orthogonalized(matrix))
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    share = (orthogonalized(matrix) * (u @ v)).sum() / values.sum()  # 1 if the singular vectors are kept
    assert share > 0.999


def test_two_steps_follow_the_formula() -> None:
    """Momentum, Nesterov's direction, weight decay, and 0.2 sqrt(max(rows, columns)) times the orthogonal factor."""
    torch.manual_seed(0)
    start, gradients = torch.randn(6, 4), [torch.randn(6, 4), torch.randn(6, 4)]
    weight = nn.Parameter(start.flatten().clone())
    set_group(weight, Group(True, 1.0, True))
    optimizer = build_optimizer(OptimizerConfig(type="muon", learning_rate=0.1, weight_decay=0.5, momentum=0.9), [weight])
    shard = Shard("w", (6, 4), None, 0, 0.0, 0.0)
    Muon.attach(optimizer.param_groups[0], [Segment(shard, [Piece(Box.full((6, 4)), 0)], 0, ())])
    expected, buffer = start.double(), torch.zeros(6, 4, dtype=torch.float64)
    for gradient in gradients:
        weight.grad = gradient.flatten().clone()
        optimizer.step()
        buffer = 0.9 * buffer + gradient.double()
        direction = gradient.double() + 0.9 * buffer
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6**0.5 * orthogonalized(direction)
    torch.testing.assert_close(weight.detach().view(6, 4), expected.float(), rtol=1e-5, atol=1e-6)


def config_of(model: str, **sections: Tree) -> object:
    return tiny_config(model=MODELS[model], optimizer={"type": "muon", "momentum": 0.9}, **sections)


@pytest.mark.parametrize("model", MODELS)
def test_layouts_train_as_one_process_does(model: str, ranks: Pool) -> None:
    expected = ranks.run(1, train, config_of(model), 2)
    adamw = ranks.run(1, train, tiny_config(model=MODELS[model]), 2)
    name = "layers.1.mlp.down.weight"
    assert (full_weights(expected)[name] - full_weights(adamw)[name]).abs().max() > 1e-3  # it is another optimizer
    layouts = list(LAYOUTS.values())
    # The models take turns; all layouts with both in the exhaustive suite.
    for world, parallel, stage in layouts if EXHAUSTIVE else layouts[list(MODELS).index(model) :: 2]:
        compare(ranks.run(world, train, config_of(model, parallel=parallel, zero={"stage": stage}), 2), expected)


def test_a_run_resumes_under_another_layout_as_if_it_had_not_stopped(ranks: Pool, tmp_path: Path) -> None:
    sections = {
        "data": {"train": corpus(tmp_path)},
        "lr_schedule": {"type": "constant"},
        "logging": {"interval": 1, "metrics_file": str(tmp_path / "metrics.jsonl")},
    }
    training = {"micro_batch_size": 2, "global_batch_size": 8}
    straight = config_of("LLaMA", **sections, training={"steps": 4, **training})
    expected = full_weights(ranks.run(1, run_trainer, straight))
    checkpoint = {"dir": str(tmp_path / "run")}
    first = config_of("LLaMA", **sections, training={"steps": 2, **training}, checkpoint=checkpoint, parallel={"tensor": 2})
    ranks.run(4, run_trainer, first)
    second = config_of("LLaMA", **sections, training={"steps": 4, **training}, checkpoint=checkpoint, parallel={"pipeline": 2})
    weights = full_weights(ranks.run(4, run_trainer, second))
    for name, values in expected.items():
        torch.testing.assert_close(weights[name], values, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("zero", [{"stage": 3}, {"stage": 1, "offload_optimizer": "cpu"}])
def test_what_muon_cannot_do_is_refused(zero: Tree) -> None:
    with pytest.raises(ConfigError, match='optimizer.type: "muon" needs zero.stage 0, 1 or 2'):
        config_of("GPT-2", zero=zero)
