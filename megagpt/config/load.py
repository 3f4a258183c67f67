"""Load a `Config`: JSON with comments, `--set` overrides with dotted keys, and all errors in one list."""

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import json5
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megagpt.config.flat import from_flat, is_flat
from megagpt.config.renamed import RENAMED_KEYS
from megagpt.config.rules import broken_rules
from megagpt.config.schema import Config
from megagpt.errors import ConfigError

Tree = dict[str, Any]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read one JSON file (`//` and `/* */` comments and trailing commas allowed) and apply `key.path=value` overrides.

    Raises ConfigError with a list of all problems.
    """
    tree = read_json(path)
    if is_flat(tree):
        tree = from_flat(tree, str(path))
    for override in overrides:
        _set(tree, override)
    return build_config(tree, str(path))


def build_config(tree: Tree, source: str = "config") -> Config:
    """Validate `tree` and return it as a `Config`. `source` names it in messages.

    Raises ConfigError with a list of all problems.
    """
    try:
        config = Config.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        details = error.errors(include_url=False)
        # For a union type pydantic reports one error for each member; the first one is enough.
        first_of_each_key = {tuple(_key_path(detail)): detail for detail in reversed(details)}
        problems = [_message(detail) for detail in reversed(first_of_each_key.values())]
        problems += _rules_broken_elsewhere(tree, details)
        raise ConfigError(_report(source, problems)) from None
    problems = [problem.message for problem in broken_rules(config)]
    if problems:
        raise ConfigError(_report(source, problems))
    return config


def read_json(path: str | Path) -> Tree:
    """Return the object in a file of JSON with comments. Raises ConfigError, also if a key appears twice."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path}: the config cannot be read: {reason}") from None
    try:
        tree = json5.loads(text, allow_duplicate_keys=False)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected one JSON object, found {type(tree).__name__}")
    return tree


def with_vocab_size(config: Config, vocab_size: int) -> Config:
    """Return `config` with another `model.vocab_size`."""
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})


def to_json(config: Config) -> str:
    """Return the complete tree as JSON, with the defaults. `build_config` reads it back to an equal `Config`."""
    return json.dumps(config.model_dump(mode="json"), indent=2)


def config_hash(config: Config) -> str:
    """Return a hash of all values: equal on two ranks if and only if their configs are equal."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()


def _set(tree: Tree, override: str) -> None:
    """Apply one override `key.path=value` to `tree`. A value that is not JSON is a string."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected key.path=value, for example parallel.tensor=4")
    try:
        value = json5.loads(text)
    except ValueError:
        value = text
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a section")
        node = child
    node[leaf] = value


def _report(source: str, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{source}: {problems[0]}"
    return "\n".join([f"{source}: {len(problems)} problems", *(f"  {problem}" for problem in problems)])


def _message(detail: ErrorDetails) -> str:
    """Return one pydantic error as a message about the file."""
    path = _key_path(detail)
    key = ".".join(path)
    if detail["type"] == "missing":
        return f"{key}: required, but missing"
    if detail["type"] == "extra_forbidden":
        return f"{key}: {_unknown_key(path)}"
    expected = detail["msg"][0].lower() + detail["msg"][1:]
    near = difflib.get_close_matches(str(detail["input"]), _choices(path), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{key}: {json.dumps(detail['input'])}: {expected}{hint}"


def _unknown_key(path: list[str]) -> str:
    """Return what to say about a key that does not exist: its new name, the nearest key, or all keys of the section."""
    new_name = RENAMED_KEYS.get(".".join(path))
    if new_name is not None:
        return f"renamed to {new_name}"
    siblings = _fields(path[:-1])
    near = difflib.get_close_matches(path[-1], siblings, n=1) or _keys_elsewhere(path[-1])
    hint = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(siblings)}"
    return f"no such key; {hint}"


def _key_path(detail: ErrorDetails) -> list[str]:
    """Return the key's path in the tree, without the names that pydantic adds for the members of a union type."""
    added = {"str", "int", "float", "bool"}
    return [str(name) for name in detail["loc"] if name not in added and "[" not in str(name)]


def _rules_broken_elsewhere(tree: Tree, details: list[ErrorDetails]) -> Iterator[str]:
    """Yield messages of broken rules that do not involve the invalid keys, so that one run shows all problems."""
    valid_tree = json.loads(json.dumps(tree))
    invalid_keys = set()
    for detail in details:
        path = _key_path(detail)
        invalid_keys.add(".".join(path))
        node = valid_tree
        for name in path[:-1]:
            node = node.get(name, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node.pop(path[-1], None)
    try:
        config = Config.model_validate_json(json.dumps(valid_tree))
    except ValidationError:
        return  # without a required key the rules cannot be checked
    for problem in broken_rules(config):
        if not invalid_keys & set(problem.keys):
            yield problem.message


def _fields(path: list[str]) -> list[str]:
    section = _section(path)
    return list(section.model_fields) if section else []


def _section(path: list[str]) -> type[BaseModel] | None:
    section: type[BaseModel] = Config
    for name in path:
        field = section.model_fields.get(name)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        section = annotation
    return section


def _keys_elsewhere(name: str) -> list[str]:
    """Return the key in another section whose name is nearest to `name`, if it is near enough."""
    keys = {key: f"{section}.{key}" for section in Config.model_fields for key in _fields([section])}
    return [keys[near] for near in difflib.get_close_matches(name, keys, n=1, cutoff=0.7)]


def _choices(path: list[str]) -> list[str]:
    section = _section(path[:-1])
    field = section.model_fields.get(path[-1]) if section else None
    return [str(choice) for choice in _literals(field.annotation)] if field else []


def _literals(annotation: Any) -> Iterator[Any]:
    """Yield the values of all Literal types in `annotation`."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _literals(member)
    elif origin is Literal:
        yield from get_args(annotation)
