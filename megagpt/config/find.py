"""Find config files: by path, or by the name of a config that comes with megagpt; and merge a config with its base."""

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megagpt.config.schema import Config
from megagpt.errors import ConfigError

_PLACES = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
"""Where the shipped configs are: in an installed package, in a checkout."""


def shipped_configs() -> dict[str, Path]:
    """Return the configs that come with megagpt, by name ("125M")."""
    folder = next((place for place in _PLACES if place.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.json"))} if folder else {}


def find_config(name: str | Path, base: Path | None = None) -> Path:
    """Return the path of a config: a file, or the name of a shipped config.

    `base`: folder that a relative path starts from; the current folder if None. Raises ConfigError with the nearest names.
    """
    path = Path(name).expanduser()
    path = base / path if base is not None else path
    if path.exists():
        return path
    shipped = shipped_configs()
    stem = str(name).removesuffix(".json")
    if stem in shipped:
        return shipped[stem]
    here = [file.name for file in path.parent.glob("*.json")] if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(path.name, [*here, *shipped], n=1, cutoff=0.5)
    hint = f"nearest: {nearest[0]}" if nearest else f"shipped configs: {', '.join(shipped) or 'none'}"
    raise ConfigError(f"{name}: no such config: No such file or directory; {hint}")


def merge_trees(base: dict[str, Any], tree: dict[str, Any], section: type[BaseModel] | None = Config) -> dict[str, Any]:
    """Return `base` with the values of `tree` in it: sections are merged, all other values are replaced."""
    merged = dict(base)
    for key, value in tree.items():
        below = _section_of(section, key)
        both_dicts = isinstance(value, dict) and isinstance(base.get(key), dict)
        if both_dicts and (below is not None or (section is Config and key == "deepspeed")):
            merged[key] = merge_trees(base[key], value, below)
        else:
            merged[key] = value
    return merged


def _section_of(section: type[BaseModel] | None, key: str) -> type[BaseModel] | None:
    field = section.model_fields.get(key) if section is not None else None
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
