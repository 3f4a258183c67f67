"""Renamed config keys. In a user's file an old name is an error; in the config of an old checkpoint it is translated."""

import copy
from typing import Any

RENAMED_KEYS = {
    "parallel.schedule_costs.most_micro_batches": "parallel.schedule_costs.max_micro_batches",
    "resilience.most_skipped": "resilience.max_skipped",
    "resilience.most_rollbacks": "resilience.max_rollbacks",
    "resilience.spike_deviations": "resilience.spike_num_std",
}
"""Old key -> new key, both dotted."""
REPLACED_KEYS = {
    "evaluation.steps": "replaced by evaluation.samples, the number of samples: steps x training.global_batch_size",
}
"""Old key without an equivalent -> what to use instead."""


def upgrade_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `tree`, a config as nested dicts, in which all old keys have their new names.

    If a key is present under both names, the value of the new name stays. Replaced keys are dropped.
    """
    upgraded = copy.deepcopy(tree)
    for old, new in RENAMED_KEYS.items():
        *old_sections, old_name = old.split(".")
        *new_sections, new_name = new.split(".")
        section = _section(upgraded, old_sections, create=False)
        if old_name in section:
            value = section.pop(old_name)
            _section(upgraded, new_sections, create=True).setdefault(new_name, value)
    for old in REPLACED_KEYS:
        *sections, name = old.split(".")
        _section(upgraded, sections, create=False).pop(name, None)
    return upgraded


def _section(tree: dict[str, Any], names: list[str], create: bool) -> dict[str, Any]:
    """Return the section at this path; an empty one, not in the tree, if there is none and `create` is false."""
    section = tree
    for name in names:
        section = section.setdefault(name, {}) if create else section.get(name, {})
        if not isinstance(section, dict):
            return {}
    return section
