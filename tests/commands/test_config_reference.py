"""docs/config.md is what tools/config_reference.py prints."""

from pathlib import Path

import pytest

from megagpt.commands.config_reference import main, reference, value_types
from megagpt.config.rules import OWNED_BY_MEGAGPT
from megagpt.config.schema import Config
from megagpt.schedules.registry import SCHEDULES

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date() -> None:
    assert (DOCS / "config.md").read_text() == reference(), "run: python tools/config_reference.py > docs/config.md"


def test_the_tool_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == reference()


def test_every_section_has_a_table_with_its_keys() -> None:
    page = reference()
    for name, field in Config.model_fields.items():
        for key in getattr(field.annotation, "model_fields", {name: field}):
            assert f"\n| `{key}` | " in page or f"\n## `{name}.{key}`\n" in page


def test_choices_are_listed_as_json_values() -> None:
    schedules = "".join(f'`"{name}"`, ' for name in SCHEDULES)
    assert f'| `schedule` | {schedules}`"auto"` | `"1f1b"` |' in reference()
    for annotation, text in (
        (int | None, "integer or `null`"),
        (bool, "`true` or `false`"),
        (list[str], "list of strings"),
        (tuple[float, float], "[number, number]"),
        (str | dict[str, float], "string or object of numbers"),
    ):
        assert value_types(annotation) == text
    assert "Literal" not in reference() and "Union" not in reference()


def test_refused_deepspeed_keys_are_listed_with_what_to_use_instead() -> None:
    for key, instead in OWNED_BY_MEGAGPT.items():
        assert f"| `{key}` | {instead} |\n" in reference()
