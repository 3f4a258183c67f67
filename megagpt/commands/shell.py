"""Shared by all command lines: argument parsers with an example, errors in one line, --debug for the traceback."""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from megagpt import __version__
from megagpt.errors import MegagptError
from megagpt.output import report_unwritable

USER_ERROR = 2
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with 2."""
        self.exit(USER_ERROR, f"error: {message}; see --help\n")


def command_parser(name: str, description: str | None, example: str) -> argparse.ArgumentParser:
    """Return a parser whose --help shows the module's docstring and an example. --debug and --version are added.

    `name`: the script, such as "pretrain_gpt.py", or the module in megagpt.commands.
    """
    module = "pretrain" if name == "pretrain_gpt.py" else name.removesuffix(".py")
    parser = Parser(
        prog=_program(sys.argv[0], name, module),
        description=description,
        epilog=f"{example}\nthe same from any folder: python -m megagpt {module} ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"megagpt {__version__}")
    return parser


def _program(started: str, name: str, module: str) -> str:
    """Return how the command was started, for its usage line; `name` if it was called from another program."""
    path = Path(started)
    if path.name.startswith("megagpt-"):
        return path.name
    if path == Path(__file__).parents[1] / "__main__.py":
        return f"python -m megagpt {module}"
    if path == Path(__file__).parent / f"{module}.py":
        return f"python -m megagpt.commands.{module}"
    return name


@report_unwritable
def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, call `main`, and return the exit code: 0, 2 for an error that the user can fix, 130 for Ctrl-C."""
    args = parser.parse_args(argv)
    try:
        main(args)
    except MegagptError as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        if error.filename is None:  # standard output, which `report_unwritable` explains
            raise
        if args.debug:
            traceback.print_exc()
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0
