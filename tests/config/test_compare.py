"""Two models differ if the same weights mean something else in them; every difference is named."""

import pytest

from megagpt.config.compare import FREE, model_differences
from megagpt.config.schema import ModelConfig

BASE = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 16, "vocab_size": 61}
OTHER = {
    "n_layer": 3,
    "n_embd": 64,
    "n_head": 8,
    "n_positions": 32,
    "encoder_layers": 2,
    "encoder_positions": 24,
    "decoder_start": 3,
    "vocab_size": 62,
    "vocab_multiple": 64,
    "ffn_hidden": 96,
    "n_kv_head": 2,
    "head_dim": 16,
    "activation": "relu",
    "gated_mlp": True,
    "norm": "rmsnorm",
    "norm_placement": "both",
    "qk_norm": "head",
    "position_embedding": "rotary",
    "relative_buckets": 16,
    "relative_max_distance": 64,
    "rotary": {"theta": 500000.0},
    "attention_window": 8,
    "full_attention_every": 2,
    "attention_scale": 0.5,
    "attention_softcap": 50.0,
    "attention_sinks": True,
    "parallel_branches": "one_norm",
    "qkv_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "embedding_scale": 2.0,
    "output_scale": 0.5,
    "logit_softcap": 30.0,
    "clf_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "mlp_pdrop": 0.1,
    "tie_embeddings": False,
    "init_std": 0.1,
    "init_scheme": "plain",
    "mup_base_width": 8,
    "layer_norm_epsilon": 1e-6,
}


def model(**keys: object) -> ModelConfig:
    return ModelConfig.model_validate({**BASE, **keys})


def test_every_key_of_the_model_is_in_this_test() -> None:
    """A new key of the schema needs a value here; it is compared unless it is in FREE."""
    assert OTHER.keys() == ModelConfig.model_fields.keys()


@pytest.mark.parametrize("key", OTHER)
def test_each_key_is_compared_or_free(key: str) -> None:
    differences = model_differences(model(), model(**{key: OTHER[key]}))
    named = {text.split()[0] for text in differences}
    if key in FREE:
        assert named == set()
    else:
        assert f"model.{key}" in named


def test_all_differences_are_named_at_once() -> None:
    assert len(model_differences(model(), model(**OTHER))) == len(OTHER.keys() - FREE)


def test_an_absent_ffn_hidden_equals_its_default_value() -> None:
    assert model_differences(model(), model(ffn_hidden=128)) == []


def test_the_sequence_length_is_free_without_weights_for_each_position() -> None:
    rotary = {"position_embedding": "rotary"}
    assert model_differences(model(**rotary), model(**rotary, n_positions=64, encoder_positions=32)) == []


def test_absent_keys_equal_what_they_stand_for() -> None:
    assert model_differences(model(), model(attention_scale=8**-0.5, n_kv_head=4, head_dim=8)) == []
    window = {"attention_window": 4}
    assert model_differences(model(**window), model(**window, full_attention_every=3)) == []  # of two layers
