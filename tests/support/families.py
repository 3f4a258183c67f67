"""One tiny model of each Hugging Face family, as keys of our config and as a config of transformers.

The weights are large (0.3) and norms and biases are moved off their initial values, so that a missing factor, offset or mask
shows.
"""

from typing import Any

import torch

from support.runs import Tree

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
        {
            "vocab_size": 61,
            "n_positions": 16,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "resid_pdrop": 0,
            "embd_pdrop": 0,
            "attn_pdrop": 0,
        },
    ),
}


def random_model(case: str) -> Any:
    """Return the model of transformers for a case, in evaluation. Needs transformers."""
    import transformers

    _, model_type, sizes = CASES[case]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **sizes, initializer_range=0.3)
    config._attn_implementation = "eager"  # the only one with capped scores
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def by_file_name(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors by their names in files, which differ from those in memory for GPT-NeoX's output layer."""
    neox = "gpt_neox.embed_in.weight" in tensors
    return {"embed_out.weight" if neox and name == "lm_head.weight" else name: value for name, value in tensors.items()}
