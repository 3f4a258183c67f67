"""Load a `Config`: JSON with comments, `--set` overrides with dotted keys, and all errors in one list."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import json5
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megagpt.config.find import find_config, merge_trees
from megagpt.config.flat import from_flat, is_flat
from megagpt.config.renamed import RENAMED_KEYS, REPLACED_KEYS
from megagpt.config.rules import broken_rules
from megagpt.config.schema import Config, accepted_types
from megagpt.errors import ConfigError
from megagpt.regular_file import read_regular_file

Tree = dict[str, Any]
MAX_CONFIG_BYTES = 2**20
MAX_DEPTH = 20
"""Levels of nesting in a config."""
MAX_PROBLEMS = 50
"""Problems that one message lists."""
MULTIPLIERS = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
"""Suffixes of numbers in --set."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read one JSON file (`//` and `/* */` comments and trailing commas allowed) and apply `key.path=value` overrides.

    `path` may be the name of a shipped config ("125M"). A file may extend another one ("extends": "125M.json").
    Raises ConfigError with a list of all problems.
    """
    tree = read_tree(path)
    for override in overrides:
        _set(tree, override)
    return build_config(tree, str(path))


def read_tree(path: str | Path, base: Path | None = None, extended_by: tuple[Path, ...] = ()) -> Tree:
    """Return the tree of a config file merged over those that it extends. Raises ConfigError."""
    file = find_config(path, base)
    if file.resolve() in extended_by:
        raise ConfigError(f"{file}: extends: leads back to this file; a config cannot extend itself")
    tree = read_json(file)
    if is_flat(tree):
        return from_flat(tree, str(path))
    extends = tree.pop("extends", None)
    if extends is None:
        return tree
    if not isinstance(extends, str):
        raise ConfigError(f"{file}: extends: {json.dumps(extends)}: expected the path or the name of a config")
    return merge_trees(read_tree(extends, file.parent, (*extended_by, file.resolve())), tree)


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
        firsts = list(reversed(first_of_each_key.values()))
        problems = [_message(detail) for detail in firsts[:MAX_PROBLEMS]]
        problems += ["another problem"] * (len(firsts) - len(problems))  # counted, not shown
        problems += _rules_broken_elsewhere(tree, details)
        raise ConfigError(_report(source, problems)) from None
    problems = [problem.message for problem in broken_rules(config)]
    if problems:
        raise ConfigError(_report(source, problems))
    return config


def read_json(path: str | Path) -> Tree:
    """Return the object in a file of JSON with comments. Raises ConfigError, also if a key appears twice."""
    try:
        text = read_regular_file(Path(path), MAX_CONFIG_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the config cannot be read: it is not UTF-8 text") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: the config cannot be read: {reason}") from None
    try:
        tree = json5.loads(text, allow_duplicate_keys=False)
    except RecursionError:
        raise ConfigError(f"{path}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        reason = re.sub(r"^<string>:(\d+)", r"line \1:", str(error))
        raise ConfigError(f"{path}: not valid JSON: {reason}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected one JSON object, found {type(tree).__name__}")
    _check_text(tree, str(path))
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
        raise ConfigError(f"--set {_short(override)}: expected key.path=value, for example parallel.tensor=4")
    *parents, leaf = key.split(".")
    if len(parents) >= MAX_DEPTH:
        raise ConfigError(f"--set {_short(override)}: no such key: it has {len(parents) + 1} parts")
    value = _parse_value(text, _accepts_number(_annotation([*parents, leaf])))
    _check_text({key: value}, "--set")
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {_short(override)}: {parent} is a value, not a section")
    node[leaf] = value


def _parse_value(text: str, number: bool) -> Any:
    """Return the value of an override: JSON; for a number also with a suffix (10M); else the text itself."""
    if number and (match := re.fullmatch(r"(\d+(?:\.\d+)?)([kKMGBT])", text)):
        scaled = Decimal(match[1]) * MULTIPLIERS[match[2]]
        return int(scaled) if scaled == int(scaled) else float(scaled)
    try:
        return json5.loads(text)
    except (ValueError, RecursionError):
        return text


def _accepts_number(annotation: Any) -> bool:
    return annotation is not None and bool(accepted_types(annotation) & {int, float})


def _check_text(tree: Any, source: str) -> None:
    """Raise ConfigError for text that no program can use, and for nesting beyond any config's."""
    pending: list[tuple[Any, int]] = [(tree, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise ConfigError(f"{source}: nested more than {MAX_DEPTH} levels deep")
        if isinstance(value, dict):
            pending += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, list):
            pending += [(item, depth + 1) for item in value]
        elif isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            shown = value.encode("ascii", "backslashreplace").decode()
            raise ConfigError(f"{source}: {_short(shown)}: half of a surrogate pair, which is not a character")


def _report(source: str, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{source}: {problems[0]}"
    shown = problems[:MAX_PROBLEMS]
    rest = [f"  and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    return "\n".join([f"{source}: {len(problems)} problems", *(f"  {problem}" for problem in shown), *rest])


def _message(detail: ErrorDetails) -> str:
    """Return one pydantic error as a message about the file."""
    path = _key_path(detail)
    key = ".".join(path)
    if detail["type"] == "missing":
        return f"{key}: required, but missing"
    if detail["type"] == "extra_forbidden":
        return f"{_short(key)}: {_unknown_key(path)}"
    text = detail["msg"].removeprefix("Value error, ")
    expected = text[0].lower() + text[1:]
    if detail["type"] == "literal_error" and bool in accepted_types(_annotation(path)):
        expected += ", true or false"
    near = difflib.get_close_matches(str(detail["input"])[:100], _choices(path), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if detail["type"] == "tuple_type":
        hint = "; write it as [0.9, 0.95]"
    return f"{key}: {_short(json.dumps(detail['input']))}: {expected}{hint}"


def _short(text: str) -> str:
    """Return `text`, shortened for a message."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def _unknown_key(path: list[str]) -> str:
    """Return what to say about a key that does not exist: its new name, the nearest key, or all keys of the section."""
    new_name = RENAMED_KEYS.get(".".join(path))
    if new_name is not None:
        return f"renamed to {new_name}"
    if ".".join(path) in REPLACED_KEYS:
        return REPLACED_KEYS[".".join(path)]
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


def _annotation(path: list[str]) -> Any:
    """Return the type of a key, or None if there is no such key."""
    section = _section(path[:-1])
    field = section.model_fields.get(path[-1]) if section else None
    return field.annotation if field else None


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
    return [str(choice) for choice in _literals(_annotation(path))] if path else []


def _literals(annotation: Any) -> Iterator[Any]:
    """Yield the values of all Literal types in `annotation`."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _literals(member)
    elif origin is Literal:
        yield from get_args(annotation)
