"""Biases of the attention scores and sinks, compared with transformers and with the formula in float64."""

import pytest
import torch
from support.cached import cached_logits
from support.runs import Tree, full_model, parameters_by_name, tiny_config

from megagpt.model.explicit_attention import QUERY_BLOCK
from megagpt.model.forward_context import ForwardContext, MicroBatch
from megagpt.model.gpt import GPTChunk
from megagpt.model.score_bias import alibi_slopes, relative_buckets

MODELS: dict[str, Tree] = {
    "ALiBi": {"position_embedding": "alibi"},
    "ALiBi, grouped heads, window": {"position_embedding": "alibi", "n_kv_head": 2, "attention_window": 5},
    "relative": {"position_embedding": "relative", "relative_buckets": 6, "relative_max_distance": 12},
    "relative, sinks": {"position_embedding": "relative", "attention_sinks": True},
    "relative vectors": {"position_embedding": "relative_vectors", "relative_max_distance": 4},
    "relative vectors, grouped heads, window, sinks": {
        "position_embedding": "relative_vectors",
        "relative_max_distance": 3,
        "n_kv_head": 2,
        "attention_window": 5,
        "attention_sinks": True,
    },
    "sinks": {"attention_sinks": True},
    "sinks, rotary, caps": {"attention_sinks": True, "position_embedding": "rotary", "attention_softcap": 3.0},
}


@pytest.mark.parametrize("heads", [1, 2, 8, 12, 20])
def test_the_slopes_are_those_of_bloom(heads: int) -> None:
    modeling_bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    theirs = modeling_bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # [heads, 1, 2]: slope x position
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), theirs[:, 0, 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (6, 12), (64, 1000)])
def test_the_buckets_are_those_of_t5(buckets: int, max_distance: int) -> None:
    modeling_t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = torch.arange(2 * max_distance)
    theirs = modeling_t5.T5Attention._relative_position_bucket(-distances, False, buckets, max_distance)
    assert torch.equal(relative_buckets(distances, buckets, max_distance), theirs)


def model_of(name: str, **keys: object) -> GPTChunk:
    model = full_model(tiny_config(model={**MODELS[name], **keys})).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_attention_follows_the_formula(name: str) -> None:
    """One layer's attention in float64 from its own weights, one query at a time."""
    model = model_of(name)
    attention, keys = model.blocks[1].attention, model.config.model
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    ctx = ForwardContext(
        rotary=model._rotary_table(torch.arange(9)), attention_masks=model._masks(None, 9, torch.device("cpu"))
    )
    seen: list[torch.Tensor] = []
    attention.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        attention(x, ctx)
        heads = attention.qkv(x)
    query, key, value = (tensor.double().transpose(1, 2) for tensor in heads)
    key, value = (tensor.repeat_interleave(4 // tensor.shape[1], 1) for tensor in (key, value))
    if ctx.rotary is not None:
        from megagpt.model.rotary import rotate

        query, key = (rotate(tensor.float(), ctx.rotary, False).double() for tensor in (query, key))
    weights = parameters_by_name(model)
    out = torch.zeros(2, 4, 9, 8, dtype=torch.float64)
    for head in range(4):
        for i in range(9):
            first = 0 if keys.attention_window is None else max(0, i + 1 - keys.attention_window)
            scores = (key[:, head, first : i + 1] @ query[:, head, i].unsqueeze(-1)).squeeze(-1) * 8**-0.5
            if keys.attention_softcap is not None:
                scores = keys.attention_softcap * torch.tanh(scores / keys.attention_softcap)
            distances = i - torch.arange(first, i + 1)
            if keys.position_embedding == "alibi":
                scores = scores - alibi_slopes(4)[head] * distances
            if keys.position_embedding == "relative":
                table = weights["layers.1.attention.relative_bias.weight"].double().view(4, -1)[head]
                scores = scores + table[relative_buckets(distances, keys.relative_buckets, keys.relative_max_distance)]
            if keys.position_embedding == "relative_vectors":
                rows = distances.clamp(max=keys.relative_max_distance)
                key_vectors, value_vectors = (
                    weights[f"layers.1.attention.relative_{kind}.weight"].double().view(-1, 8)[rows]
                    for kind in ("keys", "values")
                )
                scores = scores + query[:, head, i] @ key_vectors.t() * 8**-0.5
            powers = scores.exp()
            total = powers.sum(-1, keepdim=True)
            if keys.attention_sinks:
                total = total + weights["layers.1.attention.sinks.weight"][head].double().exp()
            out[:, head, i] = ((powers / total).unsqueeze(1) @ value[:, head, first : i + 1]).squeeze(1)
            if keys.position_embedding == "relative_vectors":
                out[:, head, i] += powers / total @ value_vectors
    expected = out.transpose(1, 2).flatten(2).detach()
    torch.testing.assert_close(seen[0].double(), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_gives_the_logits_of_the_full_text(name: str) -> None:
    model = model_of(name)
    tokens = torch.randint(0, 61, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model.logits(tokens)
        pieces = cached_logits(model, tokens, [5, *[1] * 7])
    torch.testing.assert_close(pieces, full[:, 4:], rtol=0, atol=2e-5 * full.abs().max().item())


@pytest.mark.parametrize("name", ["ALiBi", "relative, sinks", "relative vectors"])
def test_a_sequence_of_several_blocks_of_queries_is_computed_as_one(name: str) -> None:
    """The first tokens of a long sequence have the logits of a short one: distances do not restart at a block."""
    model = model_of(name, n_positions=QUERY_BLOCK + 40)
    tokens = torch.randint(0, 61, (1, QUERY_BLOCK + 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        last = cached_logits(model, tokens, [QUERY_BLOCK + 39, 1])[:, 1]  # a single query, in a block of its own
        torch.testing.assert_close(model.logits(tokens)[:, -1], last, rtol=0, atol=2e-5 * last.abs().max().item())


@pytest.mark.parametrize("name", ["relative", "relative vectors", "sinks"])
def test_every_learned_number_gets_a_gradient(name: str) -> None:
    model = model_of(name).train()
    tokens = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(0))
    model(None, MicroBatch(tokens[:, :-1], tokens[:, 1:])).backward()
    for parameter_name, parameter in parameters_by_name(model).items():
        if parameter_name.endswith(("bias.weight", "keys.weight", "values.weight", "sinks.weight")):
            assert parameter.grad is not None and (parameter.grad != 0).all(), parameter_name
