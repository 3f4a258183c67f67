"""Renamed keys: an error with the new name in a user's file, translated in the config of an old checkpoint."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import build_config, load_config, upgrade_keys
from megagpt.config.renamed import RENAMED_KEYS, REPLACED_KEYS
from megagpt.errors import ConfigError

SMALL: dict[str, Any] = {
    "model": {"n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 16},
    "training": {"steps": 10, "micro_batch_size": 2, "global_batch_size": 16},
}


def with_key(key: str, value: Any) -> dict[str, Any]:
    """Return SMALL with one more key, given by its dotted name."""
    tree = copy.deepcopy(SMALL)
    *sections, name = key.split(".")
    section = tree
    for parent in sections:
        section = section.setdefault(parent, {})
    section[name] = value
    return tree


@pytest.mark.parametrize("old, new", RENAMED_KEYS.items())
def test_an_old_name_in_a_file_is_an_error_that_says_the_new_name(old: str, new: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(with_key(old, 3)))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value) == f"{path}: {old}: renamed to {new}"


@pytest.mark.parametrize("old, new", RENAMED_KEYS.items())
def test_an_old_name_on_the_command_line_is_an_error_that_says_the_new_name(old: str, new: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(SMALL))
    with pytest.raises(ConfigError) as error:
        load_config(path, [f"{old}=3"])
    assert str(error.value) == f"{path}: {old}: renamed to {new}"


@pytest.mark.parametrize("old, instead", REPLACED_KEYS.items())
def test_a_replaced_key_is_an_error_that_says_what_to_use_and_is_dropped_from_an_old_checkpoint(old: str, instead: str) -> None:
    with pytest.raises(ConfigError, match=f"^config: {old}: {instead}$"):
        build_config(with_key(old, 3))
    assert build_config(upgrade_keys(with_key(old, 3))) == build_config(SMALL)


def test_an_old_name_is_listed_with_all_other_problems() -> None:
    tree = with_key("resilience.most_skipped", 3)
    tree["model"]["n_head"] = 5
    with pytest.raises(ConfigError) as error:
        build_config(tree)
    assert "2 problems" in str(error.value)
    assert "resilience.most_skipped: renamed to resilience.max_skipped" in str(error.value)
    assert "5 heads do not divide model.n_embd 32" in str(error.value)


@pytest.mark.parametrize("old, new", RENAMED_KEYS.items())
def test_the_config_of_an_old_checkpoint_loads_with_its_values(old: str, new: str) -> None:
    saved = with_key(old, 3)
    assert build_config(upgrade_keys(saved)) == build_config(with_key(new, 3))
    assert saved == with_key(old, 3), "the argument is not changed"


def test_an_old_key_with_the_value_null_is_renamed_too() -> None:
    upgraded = upgrade_keys(with_key("parallel.schedule_costs.most_micro_batches", None))
    assert upgraded == with_key("parallel.schedule_costs.max_micro_batches", None)


def test_a_tree_without_old_names_is_not_changed() -> None:
    assert upgrade_keys(SMALL) == SMALL
    assert upgrade_keys({"resilience": 3}) == {"resilience": 3}


def test_a_value_under_the_new_name_wins() -> None:
    tree = SMALL | {"resilience": {"most_skipped": 3, "max_skipped": 4}}
    assert upgrade_keys(tree) == with_key("resilience.max_skipped", 4)


@pytest.mark.parametrize("old, new", RENAMED_KEYS.items())
def test_every_new_name_is_a_key_and_no_old_name_is(old: str, new: str) -> None:
    build_config(with_key(new, 3))
    with pytest.raises(ConfigError):
        build_config(with_key(old, 3))
