"""Each family has one table of config keys; what a family cannot express is named."""

from typing import Any

import pytest
from support.families import CASES
from support.runs import Tree, tiny_config

from megagpt.hugging_face.families import FAMILIES
from megagpt.hugging_face.keys import UnsupportedError
from megagpt.hugging_face.model_keys import MODEL_KEYS

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


def test_gpt_neox_s_older_keys_are_read() -> None:
    base = CASES["gpt_neox"][2]
    older = {key: value for key, value in base.items() if key != "rope_parameters"}
    model = MODEL_KEYS["gpt_neox"].to_model({**older, "rotary_pct": 0.5, "rotary_emb_base": 5000})
    assert (model["rotary"]["fraction"], model["rotary"]["theta"]) == (0.5, 5000)
    assert MODEL_KEYS["gpt_neox"].to_model(older)["rotary"]["fraction"] == 0.25
