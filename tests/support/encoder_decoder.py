"""The config of a tiny model with an encoder, for tests."""

from megagpt.config import Config
from support.runs import Tree, tiny_config

T5: Tree = {
    "encoder_layers": 4,
    "encoder_positions": 24,
    "position_embedding": "relative",
    "relative_buckets": 8,
    "relative_max_distance": 20,
    "norm": "rmsnorm",
    "gated_mlp": True,
    "activation": "gelu_tanh",
    "ffn_hidden": 48,
    "qkv_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
}
"""Keys of the section model: T5 v1.1, with other numbers of positions in the two stacks, and a tied embedding."""


def t5_config(**sections: Tree) -> Config:
    """Return the config of a tiny T5, with keys of any section replaced."""
    model = {**T5, **sections.pop("model", {})}
    return tiny_config(model=model, **sections)
