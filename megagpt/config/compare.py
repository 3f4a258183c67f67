"""Compare the config of a checkpoint with the config of a run. Pure functions."""

from collections.abc import Collection
from typing import Any

from megagpt.config.schema import ModelConfig

FREE = frozenset(
    {"vocab_multiple", "clf_pdrop", "embd_pdrop", "attn_pdrop", "resid_pdrop", "mlp_pdrop", "init_std", "init_scheme"}
)
"""Keys that may change on resume: the saved weights mean the same with any value."""


def model_differences(saved: ModelConfig, current: ModelConfig) -> list[str]:
    """Return a clause of a message for each key in which the two models differ, except the free ones."""
    return [
        f"model.{key} is {before} in the checkpoint and {after} in the config"
        for key, (before, after) in differing_keys(saved, current).items()
    ]


def differing_keys(first: ModelConfig, second: ModelConfig) -> dict[str, tuple[object, object]]:
    """Return the keys in which two models differ, except the free ones, with both values."""
    before, after = _effective_values(first), _effective_values(second)
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def changed_keys(saved: dict[str, Any], current: dict[str, Any], skip: Collection[str] = ()) -> list[str]:
    """Return "section.key before -> after" for each key of both configs that differs.

    `skip`: sections and full keys that are not compared.
    """
    changes = []
    for section, keys in current.items():
        before = saved.get(section)
        if section in skip or not isinstance(keys, dict) or not isinstance(before, dict):
            continue
        for key, value in keys.items():
            if key in before and before[key] != value and f"{section}.{key}" not in skip:
                changes.append(f"{section}.{key} {before[key]} -> {value}")
    return changes


def _effective_values(model: ModelConfig) -> dict[str, object]:
    """Return the values of all keys except the free ones; absent values are replaced by what they stand for.

    A new key of the schema is included automatically. Only learned positions have weights for each position: without them
    the sequence length may change.
    """
    values = {key: getattr(model, key) for key in ModelConfig.model_fields if key not in FREE}
    return values | {
        "ffn_hidden": model.ffn_hidden_size,
        "head_dim": model.head_size,
        "n_kv_head": model.kv_heads,
        "n_positions": model.n_positions if model.position_embedding == "learned" else None,
        "encoder_positions": model.source_length if model.position_embedding == "learned" else None,
        "attention_scale": model.attention_scale or max(1, model.head_size) ** -0.5,
        "full_attention_every": model.full_attention_every if model.n_layer >= (model.full_attention_every or 0) else None,
    }
