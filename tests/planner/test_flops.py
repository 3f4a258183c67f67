"""Training FLOPs per token: the 6 N + 12 L h s of PaLM, nanoGPT and Megatron-LM."""

import math

import pytest
from support.runs import Tree, tiny_config

from megagpt.config import Config
from megagpt.model.meta_model import meta_model
from megagpt.parallel.parameter import shard_of
from megagpt.planner.flops import training_flops_per_token
from megagpt.planner.parameters import parameter_count

GPT3: Tree = {"n_layer": 96, "n_embd": 12288, "n_head": 96, "n_positions": 2048, "vocab_size": 51200}


def matrix_weights(config: Config) -> int:
    """Return the elements of all matrices that a token is multiplied with: the output layer, not the lookup tables."""
    output_layer = "embedding.token.weight" if config.model.tie_embeddings else "head.weight"
    shards = [shard_of(parameter) for parameter in meta_model(config).parameters()]
    assert output_layer in {shard.name for shard in shards}
    return sum(
        math.prod(shard.shape)
        for shard in shards
        if len(shard.shape) == 2 and (shard.name == output_layer or not shard.name.startswith("embedding."))
    )


@pytest.mark.parametrize(
    "model",
    [
        GPT3,
        {**GPT3, "tie_embeddings": False},
        {**GPT3, "ffn_hidden": 30000},
        {"n_layer": 3, "n_embd": 48, "n_head": 4, "n_positions": 64, "vocab_size": 80},
    ],
)
def test_six_flops_per_matrix_weight_and_the_full_square_of_attention(model: Tree) -> None:
    config = tiny_config(model=model)  # the vocabulary has no padding
    attention = 12 * model["n_layer"] * model["n_embd"] * model["n_positions"]
    assert training_flops_per_token(config) == 6 * matrix_weights(config) + attention


def test_biases_norms_and_positions_make_no_difference_for_gpt3() -> None:
    config = tiny_config(model=GPT3)
    attention = 12 * GPT3["n_layer"] * GPT3["n_embd"] * GPT3["n_positions"]
    assert training_flops_per_token(config) == pytest.approx(6 * parameter_count(config) + attention, rel=1e-3)


def test_untied_embeddings_cost_the_same_because_a_lookup_is_no_product() -> None:
    tied, untied = tiny_config(model=GPT3), tiny_config(model={**GPT3, "tie_embeddings": False})
    assert training_flops_per_token(tied) == training_flops_per_token(untied)


LLAMA: Tree = {
    "n_layer": 6,
    "n_embd": 64,
    "n_head": 8,
    "n_kv_head": 2,
    "head_dim": 16,
    "ffn_hidden": 160,
    "n_positions": 128,
    "vocab_size": 96,
    "tie_embeddings": False,
    "norm": "rmsnorm",
    "gated_mlp": True,
    "activation": "silu",
    "position_embedding": "rotary",
    "qkv_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
}


@pytest.mark.parametrize(
    "keys, windows",
    [
        ({}, [128] * 6),
        ({"qk_norm": "head", "n_kv_head": 1}, [128] * 6),
        ({"n_kv_head": 8, "norm_placement": "both", "tie_embeddings": True}, [128] * 6),
        ({"attention_window": 32}, [32] * 6),
        ({"attention_window": 32, "full_attention_every": 3}, [32, 32, 128, 32, 32, 128]),
        ({"attention_window": 500}, [128] * 6),
    ],
)
def test_grouped_heads_gated_mlps_and_windows_have_the_flops_of_a_closed_formula(keys: Tree, windows: list[int]) -> None:
    model = {**LLAMA, **keys}
    h, width, f, kv = 64, 8 * 16, 160, model["n_kv_head"] * 16
    weights = 6 * (h * width + 2 * h * kv + width * h + 3 * h * f) + 96 * h  # the last: the output layer
    attention = sum(12 * width * window for window in windows)
    assert training_flops_per_token(tiny_config(model=model)) == 6 * weights + attention


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_does_not_count(recompute: str) -> None:
    assert training_flops_per_token(tiny_config(training={"recompute": recompute})) == training_flops_per_token(tiny_config())
