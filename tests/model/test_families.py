"""Each family equals the model of Hugging Face transformers with the same weights: logits, loss, gradients, cached logits.

fp32; the same sums in another order: 2e-5 relative to the largest value. The weights are large (0.3) and norms and biases are
moved off their initial values, so that a missing factor, offset or mask shows.
"""

from typing import Any, NamedTuple

import pytest
import torch
from support.runs import Tree, full_model, parameters_by_name, tiny_config

from megagpt.config import Config
from megagpt.hugging_face.families import FAMILIES
from megagpt.model.forward_context import MicroBatch
from megagpt.model.gpt import GPTChunk
from megagpt.model.kv_cache import KVCache

transformers = pytest.importorskip("transformers")

LLAMA: Tree = {
    "position_embedding": "rotary",
    "norm": "rmsnorm",
    "gated_mlp": True,
    "activation": "silu",
    "ffn_hidden": 48,
    "qkv_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_embeddings": False,
    "layer_norm_epsilon": 1e-6,
}
GROUPED: Tree = {**LLAMA, "n_kv_head": 2}
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_SCALING = {"theta": 500000.0, "factor": 8.0, "original_positions": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rope(kind: str, **keys: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **keys}}


CASES: dict[str, tuple[Tree, str, dict[str, Any]]] = {
    "llama": (GROUPED, "llama", SIZES),
    "llama, as many key and value heads": (LLAMA, "llama", {**SIZES, "num_key_value_heads": 4}),
    "llama 3.1": (
        {**GROUPED, "rotary": {"scaling": "llama3", **LLAMA3_SCALING}},
        "llama",
        {
            **SIZES,
            **rope(
                "llama3",
                rope_theta=500000.0,
                factor=8.0,
                original_max_position_embeddings=8,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            ),
        },
    ),
    "llama, yarn": (
        {**GROUPED, "rotary": {"scaling": "yarn", "factor": 4.0, "original_positions": 16}},
        "llama",
        {**SIZES, **rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    ),
    "llama, linear": (
        {**GROUPED, "rotary": {"scaling": "linear", "factor": 4.0}},
        "llama",
        {**SIZES, **rope("linear", factor=4.0)},
    ),
    "llama, biases": (
        {**GROUPED, "qkv_bias": True, "attention_bias": True, "mlp_bias": True},
        "llama",
        {**SIZES, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ({**GROUPED, "attention_window": 5}, "mistral", {**SIZES, "sliding_window": 5}),
    "qwen2": ({**GROUPED, "qkv_bias": True}, "qwen2", SIZES),
    "qwen3": ({**GROUPED, "qk_norm": "head", "head_dim": 12}, "qwen3", {**SIZES, "head_dim": 12}),
    "olmo2": (
        {**GROUPED, "qk_norm": "width", "norm_placement": "after", "layer_norm_epsilon": 1e-5},
        "olmo2",
        {**SIZES, "rms_norm_eps": 1e-5},
    ),
    "gemma2": (
        {
            **GROUPED,
            "norm": "rmsnorm_plus_one",
            "norm_placement": "both",
            "activation": "gelu_tanh",
            "attention_softcap": 5.0,
            "logit_softcap": 3.0,
            "attention_window": 5,
            "full_attention_every": 2,
            "attention_scale": 0.2,
            "embedding_scale": 32**0.5,
            "tie_embeddings": True,
            "head_dim": 16,
        },
        "gemma2",
        {
            **SIZES,
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 25,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gpt_neox": (
        {
            "position_embedding": "rotary",
            "rotary": {"fraction": 0.25},
            "parallel_branches": "two_norms",
            "tie_embeddings": False,
            "ffn_hidden": 48,
        },
        "gpt_neox",
        {
            **{key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
            **rope("default", partial_rotary_factor=0.25),
        },
    ),
    "gpt2": (
        {"activation": "gelu_tanh"},
        "gpt2",
        {"vocab_size": 61, "n_positions": 16, "n_embd": 32, "n_layer": 4, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0},
    ),
}


class Models(NamedTuple):
    """The same model twice."""

    ours: GPTChunk
    config: Config
    theirs: Any
    family: str


@pytest.fixture(scope="module", params=CASES)
def models(request: pytest.FixtureRequest) -> Models:
    keys, model_type, sizes = CASES[request.param]
    torch.manual_seed(0)
    hf_config = transformers.AutoConfig.for_model(model_type, **sizes, initializer_range=0.3, attention_dropout=0.0)
    hf_config._attn_implementation = "eager"  # the only one with capped scores
    theirs = transformers.AutoModelForCausalLM.from_config(hf_config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    config = tiny_config(model=keys)
    ours = full_model(config).eval()
    parameters, state = parameters_by_name(ours), theirs.state_dict()
    with torch.no_grad():
        for name, value in converted(state, model_type, config).items():
            parameters[name][: value.shape[0]] = value
    return Models(ours, config, theirs, model_type)


def converted(tensors: dict[str, torch.Tensor], family: str, config: Config) -> dict[str, torch.Tensor]:
    """Return Hugging Face's tensors by megagpt's names."""
    rules = FAMILIES[family].rules(config.model)
    return {name: rule.to_megagpt([tensors[prefix + part] for part in rule.names]) for name, rule, prefix in rules}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_the_table_names_every_parameter_and_tensor_once(models: Models) -> None:
    rules = list(FAMILIES[models.family].rules(models.config.model))
    assert sorted(name for name, _, _ in rules) == sorted(parameters_by_name(models.ours))
    theirs = [prefix + part for _, rule, prefix in rules for part in rule.names]
    tied = {"lm_head.weight"} if models.config.model.tie_embeddings else set()
    assert sorted(theirs) == sorted(models.theirs.state_dict().keys() - tied)


def test_the_rules_give_the_tensors_back_bit_for_bit(models: Models) -> None:
    state = models.theirs.state_dict()
    for _, rule, prefix in FAMILIES[models.family].rules(models.config.model):
        tensors = [state[prefix + part] for part in rule.names]
        for before, after in zip(tensors, rule.from_megagpt(rule.to_megagpt(tensors)), strict=True):
            assert torch.equal(before, after)


def test_logits_loss_and_every_gradient_are_equal(models: Models) -> None:
    tokens = torch.randint(0, 61, (3, 17))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    labels[0, :5] = -100
    count = int((labels != -100).sum())
    logits = models.theirs(inputs).logits
    close(models.ours.logits(inputs), logits)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss = models.ours(None, MicroBatch(inputs, labels)) / count
    close(loss.detach(), expected.detach())
    models.theirs.zero_grad()
    models.ours.zero_grad()
    expected.backward()
    loss.backward()
    parameters = parameters_by_name(models.ours)
    gradients = {name: parameter.grad for name, parameter in models.theirs.named_parameters()}
    for name, gradient in converted(gradients, models.family, models.config).items():
        close(parameters[name].grad[: gradient.shape[0]], gradient)


def test_the_cache_gives_the_logits_of_the_full_text(models: Models) -> None:
    tokens = torch.randint(0, 61, (1, 12))
    with torch.no_grad():
        full = models.ours.logits(tokens)
        caches = {int(index): KVCache() for index in models.ours.layers}
        pieces = [models.ours.logits(tokens[:, :5], caches)]
        pieces += [models.ours.logits(tokens[:, i : i + 1], caches) for i in range(5, 12)]
    close(torch.cat(pieces, 1), full)
