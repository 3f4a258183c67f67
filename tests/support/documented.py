"""The commands that the documentation and the programs print."""

import importlib
import re
from pathlib import Path

from support.commands import ROOT

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
MODULES = sorted(path.stem for path in (ROOT / "megagpt" / "commands").glob("*.py"))
COMMENTED = (*sorted((ROOT / "examples").rglob("*.s*")), *sorted((ROOT / "configs").glob("*.json")))
"""Scripts and configs, which may have commands in their comments."""
_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
_PROGRAM = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python|deepspeed|torchrun|mpirun|bash|sbatch|srun|make|source|pip|megagpt-[\w-]+) ")
_NAMED_FILE = re.compile(r"^// ([\w.-]+\.json)\n")


def page_commands(page: Path) -> list[str]:
    """Return the commands of a page: all lines of its bash blocks, and lines of other blocks that start with a program.

    Console blocks have sessions instead.
    """
    commands = []
    for language, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "console":
            continue
        lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
        commands += [line for line in lines if line and _is_command(line, language)]
    return commands


def _is_command(line: str, language: str) -> bool:
    return not line.startswith("#") if language == "bash" else bool(_PROGRAM.match(line))


def page_sessions(page: Path) -> list[tuple[str, str]]:
    """Return the commands of a page's console blocks, after "$ ", each with the output that the page shows."""
    sessions = []
    for language, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "console":
            sessions += [tuple(part.split("\n", 1)) for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return sessions


def page_files(page: Path) -> dict[str, str]:
    """Return the files that a page shows to be written: JSON blocks whose first line is a comment with a name."""
    blocks = [block for language, block in _BLOCK.findall(page.read_text(encoding="utf-8")) if language == "json"]
    return {match[1]: block for block in blocks if (match := _NAMED_FILE.match(block))}


def help_commands(module: str) -> list[str]:
    """Return the examples below the --help of a command; empty for a module that is no command."""
    create_parser = getattr(importlib.import_module(f"megagpt.commands.{module}"), "create_parser", None)
    epilog = create_parser().epilog or "" if create_parser else ""
    return [line.strip() for line in epilog.splitlines() if line.startswith("  ") and _PROGRAM.match(line.strip())]


def comment_commands(path: Path) -> list[str]:
    """Return the commands in the comments of a script or a config, without synopses such as "bash FILE [--set ...]"."""
    comments = re.findall(r"^\s*(?:#|//) +(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [line for line in comments if _PROGRAM.match(line) and not re.search(r"[\[`]|\b[A-Z]{4,}\b", line)]
