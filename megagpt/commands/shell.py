"""Shared by all command lines: argument parsers with an example, errors in one line, --debug for the traceback."""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

from megagpt.errors import MegagptError
from megagpt.output import report_unwritable

USER_ERROR = 2
INTERRUPTED = 130


def command_parser(name: str, description: str | None, example: str) -> argparse.ArgumentParser:
    """Return a parser whose --help shows the module's docstring and an example. --debug is added."""
    parser = argparse.ArgumentParser(
        prog=name, description=description, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0
