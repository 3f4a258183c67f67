"""Initial weights have the standard deviations of each scheme, and muP keeps what a step changes equal over widths."""

import pytest
import torch
from support.runs import Tree, full_model, parameters_by_name, tiny_config

from megagpt.config import Config
from megagpt.engine.optimizer import build_optimizer, group_of_shard, set_group, set_learning_rate
from megagpt.model.forward_context import MicroBatch
from megagpt.parallel.parameter import shard_of

WIDTHS = (64, 256, 1024)


def measured(model: Tree) -> dict[str, float]:
    """Return the standard deviation of the weights of each kind."""
    chunk = full_model(tiny_config(model={"n_layer": 2, "n_embd": 256, "n_head": 4, "init_std": 0.02, **model}))
    names = {
        "embedding": "embedding.token.weight",
        "qkv": "layers.1.attention.qkv.weight",
        "proj": "layers.1.attention.proj.weight",
        "up": "layers.1.mlp.up.weight",
        "down": "layers.1.mlp.down.weight",
    }
    parameters = parameters_by_name(chunk)
    return {kind: parameters[name][:61].std().item() for kind, name in names.items()}


@pytest.mark.parametrize(
    "keys, embedding, hidden, residual",
    [
        ({}, 0.02, 0.02, 0.02 / 2),  # sqrt(2 x 2 layers)
        ({"init_scheme": "plain"}, 0.02, 0.02, 0.02),
        ({"init_scheme": "small_wang"}, (2 / (5 * 256)) ** 0.5, (2 / (5 * 256)) ** 0.5, 2 / (2 * 16)),
        ({"mup_base_width": 64}, 0.02, 0.02 / 2, 0.02 / 4),  # 4 times the width
        ({"mup_base_width": 64, "init_scheme": "plain"}, 0.02, 0.02 / 2, 0.02 / 2),
    ],
)
def test_a_scheme_has_its_standard_deviations(keys: Tree, embedding: float, hidden: float, residual: float) -> None:
    """At least 15,000 draws each: 3% is five standard errors."""
    expected = {"embedding": embedding, "qkv": hidden, "proj": residual, "up": hidden, "down": residual}
    assert measured(keys) == pytest.approx(expected, rel=0.03)


def config_of_width(width: int, base: int | None) -> Config:
    model = {"n_layer": 2, "n_embd": width, "n_head": width // 16, "init_std": 0.05, "mup_base_width": base}
    return tiny_config(model=model, optimizer={"learning_rate": 3e-3, "eps": 1e-12, "weight_decay": 0.0})


def change_of_logits(config: Config, steps: int = 5) -> float:
    """Return the root mean square by which the logits of fixed tokens change in some steps of Adam."""
    torch.manual_seed(0)
    chunk = full_model(config)
    parameters = list(chunk.parameters())
    for parameter in parameters:
        set_group(parameter, group_of_shard(shard_of(parameter), config))
    optimizer = build_optimizer(config.optimizer, parameters)
    set_learning_rate(optimizer.param_groups, config.optimizer.learning_rate)
    tokens = torch.randint(0, 61, (8, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = chunk.logits(tokens[:, :-1])
    for _ in range(steps):
        optimizer.zero_grad()
        (chunk(None, MicroBatch(tokens[:, :-1], tokens[:, 1:])) / tokens[:, 1:].numel()).backward()
        optimizer.step()
    with torch.no_grad():
        return (chunk.logits(tokens[:, :-1]) - before).square().mean().sqrt().item()


def test_with_mup_a_step_changes_the_logits_equally_at_every_width() -> None:
    """The coordinate check of arXiv 2203.03466, appendix D.1: flat over 16 times the width, and growing without muP."""
    flat = [change_of_logits(config_of_width(width, WIDTHS[0])) for width in WIDTHS]
    growing = [change_of_logits(config_of_width(width, None)) for width in WIDTHS]
    assert flat[0] == growing[0]  # at the base width muP changes nothing
    assert max(flat) < 2 * min(flat), flat
    assert growing[2] > 4 * growing[0], growing


def test_mup_scales_matrices_of_the_blocks_alone() -> None:
    config = tiny_config(model={"n_embd": 64, "mup_base_width": 16, "position_embedding": "relative", "attention_sinks": True})
    for name, parameter in parameters_by_name(full_model(config)).items():
        scaled = name.startswith("layers.") and name.endswith(("qkv.weight", "proj.weight", "up.weight", "down.weight"))
        assert group_of_shard(shard_of(parameter), config).lr_scale == (0.25 if scaled else 1.0), name


def test_learning_rates_by_pattern_are_multiplied() -> None:
    scales = {"embedding.*": 0.5, "layers.*.bias": 2.0, "layers.0.*": 3.0}
    config = tiny_config(optimizer={"learning_rate_scales": scales})
    expected = {
        "embedding.token.weight": 0.5,
        "layers.0.mlp.up.weight": 3.0,
        "layers.0.mlp.up.bias": 6.0,
        "layers.1.mlp.up.bias": 2.0,
        "layers.1.mlp.up.weight": 1.0,
        "final_norm.bias": 1.0,
    }
    parameters = parameters_by_name(full_model(config))
    assert {name: group_of_shard(shard_of(parameters[name]), config).lr_scale for name in expected} == expected
