"""FLOPs that the modules report: equal to the published formulas, and to the products that a forward executes."""

import pytest
import torch
from support.encoder_decoder import t5_config
from support.products import MatrixProducts
from support.runs import Tree, full_model, micro_batches, tiny_config

from megagpt.config import Config
from megagpt.model.meta_model import meta_chunk, meta_model
from megagpt.parallel.parallel_context import ParallelContext

GPT3: Tree = {"n_layer": 96, "n_embd": 12288, "n_head": 96, "n_positions": 2048, "vocab_size": 51200}


def gpt3(**changes: object) -> Config:
    return tiny_config(model={**GPT3, **changes})


def forward_flops(config: Config) -> int:
    """Return the forward FLOPs of the model for one token, without the embeddings."""
    model, length = meta_model(config), config.model.n_positions
    return sum(block.flops_per_token(length) for block in model.blocks) + model.loss.flops_per_token()


def test_forward_flops_are_a_third_of_the_published_step_without_the_masked_half_of_attention() -> None:
    """72 B L s h^2 (1 + s / 6h + V / 12hL) without recompute (arXiv 2205.05198, equation 7): forward and backward."""
    config = gpt3()
    h, s, n, v = GPT3["n_embd"], GPT3["n_positions"], GPT3["n_layer"], config.model.padded_vocab_size
    published = 72 * n * h**2 * (1 + s / (6 * h) + v / (12 * h * n)) / 3
    masked = n * 2 * s * h
    assert forward_flops(config) == pytest.approx(published - masked, rel=1e-12)


def test_a_wider_mlp_costs_its_matrices() -> None:
    h, length = GPT3["n_embd"], GPT3["n_positions"]
    plain, wide = (meta_model(config).blocks[0] for config in (gpt3(), gpt3(ffn_hidden=5 * h)))
    assert wide.flops_per_token(length) - plain.flops_per_token(length) == 2 * 2 * h**2


def test_the_attention_core_costs_half_a_square_which_grows_with_the_sequence() -> None:
    attention = meta_model(gpt3()).blocks[0].attention
    h = GPT3["n_embd"]
    scores_and_values = 2 * 2 * 2048 * h  # two products of the full square of positions, per token
    assert attention.core_flops_per_token(2048) == scores_and_values / 2
    assert attention.flops_per_token(4096) - attention.flops_per_token(2048) == attention.core_flops_per_token(2048)


@pytest.mark.parametrize("window", [1, 7, 16, 100])
def test_a_window_costs_the_tokens_that_each_token_sees(window: int) -> None:
    config = tiny_config(model={"attention_window": window, "position_embedding": "rotary", "head_dim": 24, "n_kv_head": 2})
    seen = sum(min(token + 1, window) for token in range(16)) / 16
    n_flops = meta_model(config).blocks[0].attention.core_flops_per_token(16)
    # The integral of the seen tokens, as for the full square: half a token less for each token that sees fewer than its window.
    assert n_flops == pytest.approx(2 * 2 * seen * 4 * 24, abs=2 * 2 * 0.5 * 4 * 24)


def test_position_embeddings_cost_almost_nothing() -> None:
    model = meta_model(gpt3())
    assert 0 < model.positions.flops_per_token() < model.blocks[0].flops_per_token(2048) / 1000


FAMILIES: list[Tree] = [
    {"n_kv_head": 2, "gated_mlp": True, "qkv_bias": False},
    {"n_kv_head": 1, "head_dim": 16, "attention_window": 5, "full_attention_every": 2, "tie_embeddings": False},
    {"parallel_branches": "one_norm", "position_embedding": "rotary", "gated_mlp": True, "ffn_hidden": 48},
]


@pytest.mark.parametrize(
    "model", [{}, {"ffn_hidden": 80, "tie_embeddings": False}, {"n_layer": 3, "vocab_size": 17}, *FAMILIES]
)
def test_the_matrix_products_of_a_forward_have_the_flops_that_the_modules_report(model: Tree) -> None:
    config = tiny_config(model=model)
    batch = micro_batches(config, 0, 0, 1)[0]
    with MatrixProducts() as products, torch.no_grad():
        full_model(config)(None, batch)
    length = config.model.n_positions
    core = sum(block.attention.core_flops_per_token(length) for block in meta_model(config).blocks)
    assert products.flops == batch.tokens.numel() * (forward_flops(config) - core)


@pytest.mark.parametrize("tensor", [2, 4])
def test_flops_are_those_of_the_unsharded_model_on_every_tensor_rank(tensor: int) -> None:
    config = tiny_config()
    full = meta_model(config)
    shard = meta_chunk(config, ParallelContext(tp_rank=1, tp_size=tensor), range(4))
    assert shard.loss.flops_per_token() == full.loss.flops_per_token()
    assert shard.blocks[0].flops_per_token(16) == full.blocks[0].flops_per_token(16)


def test_the_products_of_encoder_and_decoder_have_the_flops_that_the_layers_report() -> None:
    """For one sample, without the scores of attention: 4 x source x queries x width for each kind of attention."""
    config = t5_config(training={"micro_batch_size": 1})
    model, batch = full_model(config), micro_batches(config, 0, 0, 1)[0]
    with MatrixProducts() as products, torch.no_grad():
        model(None, batch)
    source, length, width = 24, 16, 32
    scores = 4 * 4 * width * source**2 + 4 * (2 * width * length**2 + 4 * width * length * source)  # 4 layers in each stack
    assert products.flops == sum(model.layer_flops()) - scores + length * model.loss.flops_per_token()
    assert model.hidden_core_flops() == 4 * 2 * width * length**2  # the masked half of the decoder's self-attention
