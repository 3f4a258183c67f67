"""Every command has an example in its help, ends errors in one line, and has exit codes for scripts."""

import argparse
from pathlib import Path

import pytest

from megagpt.commands import shell
from megagpt.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    return shell.command_parser("tool", "tool.py: do something.", "example:\n  python tool.py --debug")


def fail(error: BaseException) -> None:
    raise error


def test_the_help_has_the_description_and_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert "tool.py: do something." in text and "example:\n  python tool.py --debug" in text


def test_success_is_exit_code_0() -> None:
    assert shell.run(lambda args: None, parser(), []) == 0


def test_an_error_of_the_user_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.run(lambda args: fail(ConfigError("training.steps: set it")), parser(), []) == 2
    assert capsys.readouterr().err == "error: training.steps: set it\n"


def test_a_path_that_the_system_refuses_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / ("a" * 300)
    assert shell.run(lambda args: path.write_text(""), parser(), []) == 2
    assert capsys.readouterr().err == f"error: {path}: File name too long\n"


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.run(lambda args: fail(ConfigError("no")), parser(), ["--debug"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("Traceback") and text.endswith("error: no\n")


def test_ctrl_c_is_exit_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.run(lambda args: fail(KeyboardInterrupt()), parser(), []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        shell.run(lambda args: fail(ZeroDivisionError()), parser(), [])
