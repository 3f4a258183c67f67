"""Output that cannot be written: a run keeps its result, a tool ends in one sentence or quietly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import sys
from megagpt.output import lossy_output, warn

with lossy_output():
    for number in range(3):
        print(f"line {number} of über", flush=True)
    warn("last line")
sys.exit(75)
"""
"""A run that prints, and ends with exit code 75."""
TOOL = """
import sys
from megagpt.output import report_unwritable

@report_unwritable
def tool():
    print("für " * int(sys.argv[1]))
    return int(sys.argv[2])

sys.exit(tool())
"""
"""A tool that prints as many words as its first argument says, and returns the second."""


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""Environment of a process that flushes its output when a line or a block is complete."""
UNBUFFERED = BUFFERED | {"PYTHONUNBUFFERED": "1"}
"""Environment of a process that writes every piece of output at once, as below the deepspeed launcher."""
BOTH = pytest.mark.parametrize("environment", [BUFFERED, UNBUFFERED], ids=["buffered", "unbuffered"])


def python(code: str, *arguments: object, **options: object) -> "subprocess.CompletedProcess[str]":
    """Run code in another process; its standard error is text, its standard output goes where `options` say."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, **{"stderr": subprocess.PIPE, "text": True, "check": False, **options})  # type: ignore


@pytest.fixture
def closed_pipe() -> int:
    """A pipe to write to, which no process reads."""
    read, write = os.pipe()
    os.close(read)
    return write


@BOTH
def test_a_run_on_a_full_disk_keeps_its_exit_code_and_its_warnings(environment: dict[str, str]) -> None:
    with Path("/dev/full").open("w") as full:
        result = python(RUN, stdout=full, env=environment)
    assert (result.returncode, result.stderr) == (75, "warning: last line\n")


@BOTH
def test_a_run_whose_pipe_is_closed_keeps_its_exit_code_and_its_warnings(environment: dict[str, str], closed_pipe: int) -> None:
    result = python(RUN, stdout=closed_pipe, env=environment)
    assert (result.returncode, result.stderr) == (75, "warning: last line\n")


def test_a_run_without_any_output_keeps_its_exit_code() -> None:
    with Path("/dev/full").open("w") as full:
        assert python(RUN, stdout=full, stderr=full).returncode == 75
    shell = ["bash", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, RUN]
    assert subprocess.run(shell, check=False).returncode == 75


def test_characters_that_cannot_be_printed_are_printed_as_escapes() -> None:
    result = python(RUN, stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 75
    assert result.stdout.splitlines() == [rf"line {number} of \xfcber" for number in range(3)]


@BOTH
@pytest.mark.parametrize("words", [1, 1_000_000])
def test_a_tool_on_a_full_disk_ends_in_one_sentence(words: int, environment: dict[str, str]) -> None:
    with Path("/dev/full").open("w") as full:
        result = python(TOOL, words, 0, stdout=full, env=environment)
    assert result.returncode == 2
    assert result.stderr == "error: standard output cannot be written: No space left on device\n"


@BOTH
@pytest.mark.parametrize("words", [1, 1_000_000])
def test_a_tool_whose_pipe_is_closed_ends_quietly(words: int, environment: dict[str, str], closed_pipe: int) -> None:
    result = python(TOOL, words, 0, stdout=closed_pipe, env=environment)
    assert (result.returncode, result.stderr) == (141, "")


def test_another_error_of_a_tool_keeps_its_exit_code(closed_pipe: int) -> None:
    assert python(TOOL, 1, 5, stdout=closed_pipe, env=BUFFERED).returncode == 5


def test_a_tool_prints_what_the_encoding_does_not_have_as_escapes() -> None:
    result = python(TOOL, 1, 0, stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stdout) == (0, "f\\xfcr \n")


def test_an_error_of_the_operating_system_that_is_not_about_the_output_is_not_hidden() -> None:
    result = python(TOOL.replace("print(", "open('/nowhere/' + "), 1, 0, stdout=subprocess.PIPE)
    assert result.returncode == 1
    assert "FileNotFoundError" in result.stderr


@pytest.mark.parametrize("command", ["inspect_checkpoint", "pretrain"])
def test_the_help_of_a_command_on_a_full_disk_ends_in_one_sentence(command: str) -> None:
    code = f"import sys; from megagpt.commands.{command} import main; sys.exit(main(['--help']))"
    with Path("/dev/full").open("w") as full:
        result = python(code, stdout=full, env=BUFFERED)
    assert result.returncode == 2
    assert result.stderr == "error: standard output cannot be written: No space left on device\n"
