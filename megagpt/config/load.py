"""From a file and overrides to a `Config`: JSON with comments, dotted `--set`, every error in one list."""

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import json5
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megagpt.config.flat import from_flat, is_flat
from megagpt.config.rules import broken_rules
from megagpt.config.schema import Config
from megagpt.errors import ConfigError

Tree = dict[str, Any]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read one JSON file (`//` and `/* */` comments and trailing commas allowed) and apply `key.path=value` overrides.

    Raises ConfigError that lists every problem at once.
    """
    tree = read_json(path)
    if is_flat(tree):
        tree = from_flat(tree, str(path))
    for override in overrides:
        _set(tree, override)
    return build_config(tree, str(path))


def build_config(tree: Tree, source: str = "config") -> Config:
    """Validate `tree`; `source` names it in messages."""
    try:
        config = Config.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        details = error.errors(include_url=False)
        first_of_each_key = {tuple(_key_parts(detail)): detail for detail in reversed(details)}
        problems = [_sentence(detail) for detail in reversed(first_of_each_key.values())] + list(_rules_beside(tree, details))
        raise ConfigError(_report(source, problems)) from None
    problems = [problem.message for problem in broken_rules(config)]
    if problems:
        raise ConfigError(_report(source, problems))
    return config


def read_json(path: str | Path) -> Tree:
    """The object in a JSON-with-comments file; a key given twice is an error."""
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
    """`config` with `model.vocab_size` taken from the tokenizer where the file left it out."""
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})


def to_json(config: Config) -> str:
    """The whole tree, defaults included; `build_config` reads it back to an equal `Config`."""
    return json.dumps(config.model_dump(mode="json"), indent=2)


def config_hash(config: Config) -> str:
    """A fingerprint of every value: equal on two ranks exactly when their configs are."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()


def _set(tree: Tree, override: str) -> None:
    """Apply one `key.path=value`; the value is JSON, or a string if it is not."""
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


def _sentence(detail: ErrorDetails) -> str:
    """One pydantic error in the words of the file's author."""
    location = _key_parts(detail)
    path, kind = ".".join(location), detail["type"]
    if kind == "missing":
        return f"{path}: required, but missing"
    if kind == "extra_forbidden":
        siblings = _fields(location[:-1])
        near = difflib.get_close_matches(location[-1], siblings, n=1) or _elsewhere(location[-1])
        hint = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(siblings)}"
        return f"{path}: no such key; {hint}"
    expected = detail["msg"][0].lower() + detail["msg"][1:]
    near = difflib.get_close_matches(str(detail["input"]), _choices(location), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{path}: {json.dumps(detail['input'])}: {expected}{hint}"


def _key_parts(detail: ErrorDetails) -> list[str]:
    """The key's path in the tree, without the names that pydantic adds for the members of a union."""
    added = {"str", "int", "float", "bool"}
    return [str(part) for part in detail["loc"] if part not in added and "[" not in str(part)]


def _rules_beside(tree: Tree, details: list[ErrorDetails]) -> Iterator[str]:
    """The joining rules that hold or break without the values in error, so that one run shows all there is to mend."""
    kept, wrong = json.loads(json.dumps(tree)), []
    for detail in details:
        location = _key_parts(detail)
        wrong.append(".".join(location))
        node = kept
        for part in location[:-1]:
            node = node.get(part, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node.pop(location[-1], None)
    try:
        config = Config.model_validate_json(json.dumps(kept))
    except ValidationError:
        return  # a required key is among the wrong ones: the rules have nothing to stand on
    for problem in broken_rules(config):
        if not set(problem.keys) & set(wrong):
            yield problem.message


def _fields(location: list[str]) -> list[str]:
    section = _section(location)
    return list(section.model_fields) if section else []


def _section(location: list[str]) -> type[BaseModel] | None:
    section: type[BaseModel] = Config
    for part in location:
        field = section.model_fields.get(part)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        section = annotation
    return section


def _elsewhere(name: str) -> list[str]:
    """Where in the tree a key of nearly this name stands."""
    places = {key: f"{section}.{key}" for section in Config.model_fields for key in _fields([section])}
    return [places[near] for near in difflib.get_close_matches(name, places, n=1, cutoff=0.7)]


def _choices(location: list[str]) -> list[str]:
    section = _section(location[:-1])
    field = section.model_fields.get(location[-1]) if section else None
    return [str(choice) for choice in _literals(field.annotation)] if field else []


def _literals(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _literals(member)
    elif origin is not None and str(origin) == "typing.Literal":
        yield from get_args(annotation)
