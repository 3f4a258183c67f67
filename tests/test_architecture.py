"""Rules of docs/architecture.md that the source code can be checked against."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megagpt"
FOLDERS = (
    "schedules",
    "config",
    "distributed",
    "parallel",
    "pipeline",
    "model",
    "data",
    "checkpoint",
    "engine",
    "resilience",
    "planner",
    "training",
    "hugging_face",
    "inference",
    "serving",
    "commands",
)
"""In import order: a folder imports only from itself and from those before it."""
WITHOUT_TORCH = ("schedules", "config", "data")
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Return the modules that a file imports, also inside functions and under TYPE_CHECKING."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def folder_of(path: Path) -> str | None:
    """Return the folder below megagpt/, or None for a module directly in it."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def test_every_folder_has_a_place_in_the_import_order() -> None:
    assert {folder_of(path) for path in MODULES} - {None} <= set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_import_goes_up(folder: str) -> None:
    allowed = {*FOLDERS[: FOLDERS.index(folder) + 1], *(path.stem for path in PACKAGE.glob("*.py"))}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in MODULES
        if folder_of(path) == folder
        for name in imports_of(path)
        if name.startswith("megagpt.") and name.split(".")[1] not in allowed and name != "megagpt.__version__"
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", WITHOUT_TORCH)
def test_folders_that_need_no_torch_do_not_import_it(folder: str) -> None:
    users = [
        str(path.relative_to(ROOT))
        for path in MODULES
        if folder_of(path) == folder and any(name.split(".")[0] == "torch" for name in imports_of(path))
    ]
    assert users == []


def test_only_one_module_uses_the_private_parts_of_deepspeed() -> None:
    users = {path.name for path in MODULES if any(name.split(".")[0] == "deepspeed" for name in imports_of(path))}
    assert users == {"deepspeed_internals.py", "deepspeed_check.py", "engine.py"}
    private = re.compile(r"\bdeepspeed(?:\.\w+)*\._|\.optimizer\._|\bds_(?:tensor|shape|numel|id|pipe)|_hp_mapping")
    found = [path.name for path in MODULES if private.search(path.read_text(encoding="utf-8"))]
    assert set(found) <= {"deepspeed_internals.py"}


def test_the_product_has_no_mocks_and_no_nonlocal() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert "unittest" not in text and not re.search(r"^\s*nonlocal\b", text, re.MULTILINE), path


def test_no_test_file_imports_another() -> None:
    names = {".".join(path.relative_to(ROOT / "tests").with_suffix("").parts) for path in (ROOT / "tests").rglob("test_*.py")}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "tests").rglob("*.py")
        for name in imports_of(path)
        if name in names or name.removeprefix("tests.") in names
    ]
    assert wrong == []


def test_the_architecture_page_names_every_folder() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    present = [folder for folder in FOLDERS if (PACKAGE / folder).exists()]
    assert [folder for folder in present if f"`megagpt/{folder}/`" not in page] == []
