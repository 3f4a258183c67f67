"""tools/config_reference.py: docs/config.md, made of the docstrings of megagpt/config/schema.py."""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megagpt.commands import shell
from megagpt.config.schema import Config

HEAD = """# Every key of a config

Made by `python tools/config_reference.py > docs/config.md` from `megagpt/config/schema.py`. One JSON file is one run;
`//` and `/* */` comments and trailing commas are allowed. Any key can be overridden: `--set parallel.tensor=4`.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="config_reference", description=__doc__)
    return shell.run(lambda args: print(reference(), end=""), parser, argv)


def reference() -> str:
    """The page, in Markdown."""
    return HEAD + "".join(_section(Config, ""))


def _section(section: type[BaseModel], path: str) -> Iterator[str]:
    simple = {name: field for name, field in section.model_fields.items() if _below(field) is None}
    if simple:
        title = f"`{path}`" if path else "At the top"
        yield f"\n## {title}\n\n{section.__doc__}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n"
    for name, field in simple.items():
        meaning = " ".join((field.description or "").split())
        yield f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {meaning} |\n"
    for name, field in section.model_fields.items():
        below = _below(field)
        if below is not None:
            yield from _section(below, f"{path}.{name}".lstrip("."))


def _below(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _type(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    return text.replace("typing.", "").replace("|", "or").replace("NoneType", "null").replace("None", "null")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return json.dumps(value)
