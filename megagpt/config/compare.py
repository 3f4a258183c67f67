"""Whether the model of a checkpoint is the model of a config: every difference at once. Pure functions."""

from megagpt.config.schema import ModelConfig

FREE = frozenset({"vocab_multiple", "embd_pdrop", "attn_pdrop", "resid_pdrop", "init_std"})
"""Keys that a run may change as it goes on: they are not in what the weights mean."""


def model_differences(saved: ModelConfig, now: ModelConfig) -> list[str]:
    """One part of a sentence for each key that makes another function of the same weights, or of other ones."""
    before, after = _meaning(saved), _meaning(now)
    return [
        f"model.{key} is {before[key]} in the checkpoint and {after[key]} in the config"
        for key in before
        if before[key] != after[key]
    ]


def _meaning(model: ModelConfig) -> dict[str, object]:
    """Every key but the free ones, with what stands for an absent one. A new key counts from the day it is declared."""
    values = {key: getattr(model, key) for key in ModelConfig.model_fields if key not in FREE}
    return values | {"ffn_hidden": model.ffn_width, "vocab_size": model.tokens_in_vocab}
