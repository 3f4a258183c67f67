"""`python -m megagpt COMMAND ...` runs a command; without a command, all are listed.

Launchers start it the same way: `torchrun --nproc_per_node 8 -m megagpt pretrain --config FILE`.
"""

import ast
import difflib
import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from megagpt import __version__, commands
from megagpt.commands.shell import USER_ERROR

HELPERS = frozenset({"job", "model_options", "progress", "shell"})
"""Modules of megagpt.commands that are no commands."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names, and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The deepspeed launcher puts the rank before the command.
    ranks = [word for word in arguments[:1] if word.startswith("--local_rank=")]
    name, *rest = arguments[len(ranks) :] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"megagpt {__version__}")
        return 0
    module = name.replace("-", "_")
    if module not in command_names():
        nearest = difflib.get_close_matches(module, command_names(), n=1, cutoff=0.0)
        print(f"error: {name}: no such command; nearest: {nearest[0]} (python -m megagpt lists all)", file=sys.stderr)
        return USER_ERROR
    code: int = import_module(f"megagpt.commands.{module}").main([*rest, *ranks])
    return code


def command_names() -> list[str]:
    """Return the modules that are commands, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(commands.__path__) if module.name not in HELPERS)


def overview() -> str:
    """Return the commands with one line each, from their docstrings; nothing is imported for this."""
    names = command_names()
    width = max(map(len, names))
    lines = [f"  {name:{width}}  {_summary(Path(commands.__path__[0]) / f'{name}.py')}" for name in names]
    return "\n".join(
        [
            "usage: python -m megagpt COMMAND ...",
            "",
            f"megagpt {__version__}: pretrain a GPT. Commands:",
            *lines,
            "",
            "COMMAND --help describes a command.",
        ]
    )


def _summary(path: Path) -> str:
    """Return the first line of a module's docstring, without the script's name in front."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0].partition(": ")[2]


if __name__ == "__main__":
    sys.exit(main())
