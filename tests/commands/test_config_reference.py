"""docs/config.md says what the code says."""

from pathlib import Path

from megagpt.commands.config_reference import reference


def test_the_page_is_made_of_the_schema() -> None:
    page = Path(__file__).parents[2] / "docs" / "config.md"
    assert page.read_text() == reference(), "run: python tools/config_reference.py > docs/config.md"
