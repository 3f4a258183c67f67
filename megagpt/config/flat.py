"""Flat GPT-style config files (`n_embd`, `n_layer`, `afn`, ...): convert them to the tree of `schema.py`."""

import difflib
from typing import Any

from megagpt.errors import ConfigError

_MODEL_KEYS = {
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "embd_pdrop": "embd_pdrop",
    "attn_pdrop": "attn_pdrop",
    "resid_pdrop": "resid_pdrop",
    "afn": "activation",
    "clf_pdrop": "clf_pdrop",
}
FLAT_KEYS = (
    *_MODEL_KEYS,
    "learning_rate",
    "lr_decay",
    "lr_decay_steps",
    "max_epochs",
    "train_dataset",
    "eval_dataset",
    "batch_size",
    "eval_batch_size",
    "optimizer",
)
GPT1_POSITIONS = 512
"""Sequence length, which these files have no key for: that of GPT-1, whose hyper-parameters they usually have."""


def is_flat(tree: dict[str, Any]) -> bool:
    """Return whether the file has flat keys and no sections."""
    return "n_embd" in tree and "model" not in tree


def from_flat(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the equivalent nested tree. `source` names the file in messages.

    `lr_decay: true` decays linearly to zero over `lr_decay_steps`. Raises ConfigError for an unknown key.
    """
    unknown = [key for key in tree if key not in FLAT_KEYS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], FLAT_KEYS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"valid in a flat file: {', '.join(FLAT_KEYS)}"
        raise ConfigError(f"{source}: {unknown[0]}: no such key; {hint}")
    model = {key: tree[flat_key] for flat_key, key in _MODEL_KEYS.items() if flat_key in tree}
    training = {"epochs": tree.get("max_epochs", 1), "micro_batch_size": 1, "global_batch_size": 1}
    if "batch_size" in tree:
        training |= {"micro_batch_size": tree["batch_size"], "global_batch_size": tree["batch_size"]}
    optimizer: dict[str, Any] = {"weight_decay": 0.0}
    if "optimizer" in tree:
        optimizer["type"] = tree["optimizer"]
    if "learning_rate" in tree:
        optimizer["learning_rate"] = tree["learning_rate"]
    schedule: dict[str, Any] = {"type": "constant"}
    if tree.get("lr_decay"):
        schedule = {"type": "linear", "decay_steps": tree.get("lr_decay_steps")}
    return {
        "model": {"n_positions": GPT1_POSITIONS, **model},
        "training": training,
        "optimizer": optimizer,
        "lr_schedule": schedule,
        "data": {"train": tree.get("train_dataset") or None, "valid": tree.get("eval_dataset") or None},
        "evaluation": {"micro_batch_size": tree.get("eval_batch_size")},
    }
