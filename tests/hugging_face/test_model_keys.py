"""Each family has one table of config keys; what a family cannot express is named."""

from typing import Any

import pytest
from support.families import CASES
from support.runs import Tree, tiny_config

from megagpt.config import load_config
from megagpt.config.compare import model_differences
from megagpt.config.schema import ModelConfig
from megagpt.hugging_face.families import FAMILIES
from megagpt.hugging_face.keys import UnsupportedError
from megagpt.hugging_face.model_keys import MODEL_KEYS
from megagpt.planner.parameters import parameter_count

LLAMA = CASES["llama"][0]


def test_every_family_has_names_of_tensors_and_of_config_keys() -> None:
    assert FAMILIES.keys() == MODEL_KEYS.keys()


@pytest.mark.parametrize("case", CASES)
def test_a_family_covers_its_own_models(case: str) -> None:
    keys, family, _ = CASES[case]
    assert MODEL_KEYS[family].missing(tiny_config(model=keys).model) == {}


NOT_COVERED: dict[str, tuple[Tree, str, str]] = {
    "capped scores": ({**LLAMA, "attention_softcap": 5.0}, "llama", "attention_softcap"),
    "interleaved rotation": ({**LLAMA, "rotary": {"interleaved": True}}, "llama", "rotary"),
    "a part of each head": ({**LLAMA, "rotary": {"fraction": 0.5}}, "llama", "rotary"),
    "NTK scaling": ({**LLAMA, "rotary": {"scaling": "ntk", "factor": 2.0}}, "llama", "rotary"),
    "a bias in the attention alone": ({**LLAMA, "attention_bias": True}, "llama", "qkv_bias"),
    "windows": ({**LLAMA, "attention_window": 4}, "llama", "attention_window"),
    "one norm for both branches": ({"parallel_branches": "one_norm"}, "gpt2", "parallel_branches"),
    "no biases in GPT-2": ({"mlp_bias": False}, "gpt2", "mlp_bias"),
    "another embedding scale": ({**CASES["gemma2"][0], "embedding_scale": 2.0}, "gemma2", "embedding_scale"),
    "a scale that is no root of an integer": ({**CASES["gemma2"][0], "attention_scale": 0.3}, "gemma2", "attention_scale"),
    "heads that do not divide the width": ({**LLAMA, "n_head": 6, "head_dim": 8}, "llama", "n_head"),
}


@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_a_family_cannot_express_is_named(name: str) -> None:
    keys, family, missing = NOT_COVERED[name]
    assert missing in MODEL_KEYS[family].missing(tiny_config(model=keys).model)


BASE: dict[str, dict[str, Any]] = {case: CASES[case][2] for case in ("llama", "mistral", "qwen2", "gemma2")}
LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    "family, keys, expected",
    [
        ("mistral", {"sliding_window": None}, (None, None)),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 7}, (None, None)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 4}, (None, None)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, (7, None)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "layer_types": LAYERS}, (7, 3)),
        ("gemma2", {"sliding_window": 7}, (7, 2)),
        ("gemma2", {"sliding_window": 7, "layer_types": ["sliding_attention"] * 4}, (7, None)),
    ],
)
def test_windows_are_read_from_every_form(family: str, keys: dict[str, Any], expected: tuple[int | None, int | None]) -> None:
    model = MODEL_KEYS[family].to_model({**BASE[family], **keys})
    assert (model.get("attention_window"), model.get("full_attention_every")) == expected


@pytest.mark.parametrize("layers", [["full_attention", *["sliding_attention"] * 3], ["chunked_attention"] * 4])
def test_windows_without_a_period_are_refused(layers: list[str]) -> None:
    with pytest.raises(UnsupportedError, match="layer_types"):
        MODEL_KEYS["gemma2"].to_model({**BASE["gemma2"], "sliding_window": 7, "layer_types": layers})


@pytest.mark.parametrize(
    "older, newer",
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
            {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16},
        ),
    ],
)
def test_both_forms_of_rotary_keys_mean_the_same(older: dict[str, Any], newer: dict[str, Any]) -> None:
    llama = MODEL_KEYS["llama"]
    assert llama.to_model({**BASE["llama"], **older}) == llama.to_model({**BASE["llama"], "rope_parameters": newer})


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "high_freq_factor"])
def test_a_missing_key_of_a_scaling_is_named(key: str) -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    del scaling[key]
    with pytest.raises(UnsupportedError, match=f"rope_parameters.{key}"):
        MODEL_KEYS["llama"].to_model({**BASE["llama"], "rope_parameters": scaling})


def test_gpt_neox_s_older_keys_are_read() -> None:
    base = CASES["gpt_neox"][2]
    older = {key: value for key, value in base.items() if key != "rope_parameters"}
    model = MODEL_KEYS["gpt_neox"].to_model({**older, "rotary_pct": 0.5, "rotary_emb_base": 5000})
    assert (model["rotary"]["fraction"], model["rotary"]["theta"]) == (0.5, 5000)
    assert MODEL_KEYS["gpt_neox"].to_model(older)["rotary"]["fraction"] == 0.25


LEGACY: dict[str, Any] = {
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
    "use_cache": True,
    "initializer_range": 0.02,
}
LLAMA_31: dict[str, Any] = {
    **LEGACY,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
OLMO: dict[str, Any] = {
    **LEGACY,
    "model_type": "olmo2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 100257,
    "pad_token_id": 100277,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}
PYTHIA: dict[str, Any] = {
    **LEGACY,
    "model_type": "gpt_neox",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
QWEN3: dict[str, Any] = {
    **LLAMA_31,
    "model_type": "qwen3",
    "head_dim": 128,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_hidden_layers": 36,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
del QWEN3["mlp_bias"]
SMALL_LLAMA: dict[str, Any] = {
    **LLAMA_31,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": {**LLAMA_31["rope_scaling"], "factor": 32.0},
    "tie_word_embeddings": True,
}
RELEASED = {
    "llama-3.2-1B": SMALL_LLAMA,
    "llama-3.1-8B": LLAMA_31,
    "llama-3.1-70B": {
        **LLAMA_31,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
    "qwen3-8B": QWEN3,
    "pythia-1.4B": PYTHIA,
    "pythia-12B": {
        **PYTHIA,
        "hidden_size": 5120,
        "intermediate_size": 20480,
        "num_attention_heads": 40,
        "num_hidden_layers": 36,
        "vocab_size": 50688,
    },
    "olmo2-7B": OLMO,
}
"""config.json of the released models, in the form of transformers 4."""


@pytest.mark.parametrize("name", RELEASED)
def test_the_config_of_a_released_model_is_the_shipped_config(name: str) -> None:
    theirs = RELEASED[name]
    model = ModelConfig.model_validate(MODEL_KEYS[theirs["model_type"]].to_model(theirs))
    assert model_differences(load_config(name).model, model) == []


def test_the_configs_of_released_gpt2_and_gemma2_are_read() -> None:
    gpt2 = {
        **LEGACY,
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    }
    config = tiny_config(model=MODEL_KEYS["gpt2"].to_model(gpt2))
    assert parameter_count(config) == 124_439_808 and config.model.tie_embeddings
    gemma2 = {
        **LEGACY,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    }
    config = tiny_config(model=MODEL_KEYS["gemma2"].to_model(gemma2))
    assert parameter_count(config) == 2_614_341_888
    assert (config.model.attention_window, config.model.full_attention_every) == (4096, 2)
