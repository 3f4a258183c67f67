"""Ranks that run other code or other libraries are named before the first step."""

from pathlib import Path

import pytest
import torch.distributed as dist
from support.pool import Pool

from megagpt.distributed.same_everywhere import code_fingerprint, require_same_code
from megagpt.errors import ConfigError


def compare(packages: list[Path], versions: list[dict[str, str]]) -> str:
    rank = dist.get_rank()
    try:
        require_same_code(packages[rank], versions[rank])
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture
def packages(tmp_path: Path) -> list[Path]:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "module.py").write_text("RATE = 1\n")
    return [tmp_path / "a", tmp_path / "b"]


def test_equal_code_at_other_places_is_accepted(packages: list[Path], ranks: Pool) -> None:
    assert ranks.run(2, compare, packages, [{"torch": "2"}] * 2) == ["", ""]


def test_a_rank_with_other_code_is_named_on_all_ranks(packages: list[Path], ranks: Pool) -> None:
    (packages[1] / "sub" / "module.py").write_text("RATE = 3\n")
    for error in ranks.run(2, compare, packages, [{}] * 2):
        assert error.startswith("megagpt's code differs: rank 0 on ") and "has another than rank 1 on" in error


def test_a_rank_with_another_library_is_named(packages: list[Path], ranks: Pool) -> None:
    for error in ranks.run(2, compare, packages, [{"torch": "2.13"}, {"torch": "2.12"}]):
        assert error.startswith("torch differs: ")


def test_the_fingerprint_depends_on_names_and_contents_of_code_only(packages: list[Path]) -> None:
    first = code_fingerprint(packages[0])
    (packages[0] / "sub" / "notes.txt").write_text("not code")
    assert code_fingerprint(packages[0]) == first == code_fingerprint(packages[1])
    (packages[0] / "sub" / "module.py").rename(packages[0] / "sub" / "other.py")
    assert code_fingerprint(packages[0]) != first
