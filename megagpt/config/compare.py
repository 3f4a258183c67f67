"""Compare the model of a checkpoint with the model of a config. Pure functions."""

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


def _effective_values(model: ModelConfig) -> dict[str, object]:
    """Return the values of all keys except the free ones; absent values are replaced by what they stand for.

    A new key of the schema is included automatically.
    """
    values = {key: getattr(model, key) for key in ModelConfig.model_fields if key not in FREE}
    return values | {"ffn_hidden": model.ffn_hidden_size, "vocab_size": model.vocab_size}
