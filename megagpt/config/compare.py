"""Compare the config of a checkpoint with the config of a run. Pure functions."""

from collections.abc import Collection
from typing import Any

from megagpt.config.schema import ModelConfig

FREE = frozenset({"vocab_multiple", "clf_pdrop", "embd_pdrop", "attn_pdrop", "resid_pdrop", "init_std"})
"""Keys that may change on resume: the saved weights mean the same with any value."""


def model_differences(saved: ModelConfig, current: ModelConfig) -> list[str]:
    """Return a clause of a message for each key in which the two models differ, except the free ones."""
    before, after = _effective_values(saved), _effective_values(current)
    return [
        f"model.{key} is {before[key]} in the checkpoint and {after[key]} in the config"
        for key in before
        if before[key] != after[key]
    ]


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

    A new key of the schema is included automatically.
    """
    values = {key: getattr(model, key) for key in ModelConfig.model_fields if key not in FREE}
    return values | {
        "ffn_hidden": model.ffn_hidden_size,
        "head_dim": model.head_size,
        "n_kv_head": model.kv_heads,
        "vocab_size": model.vocab_size,
    }
