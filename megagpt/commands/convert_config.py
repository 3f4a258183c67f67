"""tools/convert_config.py: turn arguments of Megatron-LM, or a config of GPT-NeoX, into a config of megagpt."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megagpt.checkpoint.files import write_durably
from megagpt.commands import shell
from megagpt.config import build_config
from megagpt.config.foreign import Converted, convert, from_keys
from megagpt.config.foreign_arguments import from_arguments
from megagpt.errors import ConfigError, listed
from megagpt.regular_file import read_regular_file

EXAMPLE = """example:
  python tools/convert_config.py examples/migrating/megatron.sh --output converted.json
The file has arguments of Megatron-LM (a shell script, or one argument per line), or is a YAML or JSON file (.yml, .yaml, .json)
of GPT-NeoX or Megatron-LM. What has no counterpart is listed on standard error. docs/migrating.md has the table."""
MAX_BYTES = 2**20


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("convert_config", __doc__, EXAMPLE)
    parser.add_argument("source", metavar="FILE", help="script or file with arguments, or a YAML file")
    parser.add_argument("--output", metavar="FILE", help="config to write, a new file (default: standard output)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return shell.run(_convert, create_parser(), argv)


def _convert(args: argparse.Namespace) -> None:
    output = None if args.output is None else Path(args.output)
    if output is not None and output.exists():
        raise ConfigError(f"--output {output}: exists already; choose another name")
    result = read_foreign(Path(args.source))
    text = json.dumps(result.tree, indent=2) + "\n"
    if output is None:
        print(text, end="")
    else:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_durably(output, text)
        except OSError as error:
            raise ConfigError(f"--output {output}: cannot be written: {error.strerror}") from None
        print(f"{output}: {sum(len(section) for section in result.tree.values())} keys")
    for problem in result.missing:
        print(f"note: {problem}", file=sys.stderr)
    if result.ignored:
        print(f"note: not needed: {listed(sorted(result.ignored), 50)}", file=sys.stderr)
    try:
        build_config(result.tree, "the converted config")
    except ConfigError as error:
        print(f"note: set what is missing: {error}", file=sys.stderr)


def read_foreign(path: Path) -> Converted:
    """Convert a file. Raises ConfigError if it cannot be read."""
    try:
        text = read_regular_file(path, MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if path.suffix not in (".yml", ".yaml", ".json"):
            return convert(from_arguments(text))
        tree: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(tree).__name__}")
    return convert(from_keys(tree))


if __name__ == "__main__":
    sys.exit(main())
