"""Every command that README, the docs, the examples and the programs print is executed, with its own arguments.

The commands run in a scratch clone with small data. First the config of a training command is checked as printed, at its full
size and for its own number of ranks, as the command itself would do. Then it trains two steps of a small model, in the same
layout, on the ranks of one replica, which are forked instead of launched.
"""

import re
import shutil
from pathlib import Path

import pytest
from support.command_runner import CommandRunner, Run
from support.commands import ROOT
from support.documented import (
    COMMENTED,
    MODULES,
    PAGES,
    comment_commands,
    help_commands,
    page_commands,
    page_files,
    page_sessions,
)
from support.encoder_decoder import T5
from support.scratch_clone import build_clone
from support.trained import write_random

from megagpt.commands import quickstart

pytestmark = pytest.mark.launch

NOT_RUN = {
    r"make (setup|lint|test)$": "set up and check a clone; .ci/run does",
    r"make quickstart-t5": "makes .venv; tests/commands/test_quickstart_t5.py runs its steps",
    r"make quickstart": "makes .venv; the steps of the quickstart run in the fixture `clone`",
    r"source \.venv/bin/activate$": "changes the shell only",
    r"python tools/get_gpt2_tokenizer\.py": "needs a network; tests/commands/test_get_gpt2_tokenizer.py has substitutes",
    r"(python|torchrun .*) finetune_classifier\.py": "a run of its own; tests/commands/test_finetune_classifier.py makes it",
    r"python tools/chat\.py": "talks to a person; tests/commands/test_chat.py does",
    r"(MEGAGPT_API_KEY=\w+ )?python tools/serve\.py": "runs until it is stopped; tests/commands/test_serve.py starts it",
    r"torchrun .* tools/evaluate\.py .*--tasks": "reads the hub; tests/inference/test_harness.py has tasks of its own",
    r"python benchmarks/": "measure speed, for minutes",
}
"""Patterns of commands that are not executed here -> the reason."""

NEXT_STEPS = "next steps of the quickstart"
SOURCES = {
    **{page.relative_to(ROOT).as_posix(): page_commands(page) for page in PAGES},
    **{f"{module} --help": help_commands(module) for module in MODULES},
    **{path.relative_to(ROOT).as_posix(): comment_commands(path) for path in COMMENTED},
    NEXT_STEPS: list(quickstart.next_commands("def next_value(self,").values()),
}
"""Where commands are printed -> the commands, in order."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which the quickstart has run, with its own 8 ranks. There is another run of the same model, runs/6B,
    and one of a model with an encoder."""
    scratch = tmp_path_factory.mktemp("documented")
    folder = scratch / "clone"
    folder.mkdir()
    build_clone(folder)
    runner = CommandRunner(scratch, set())

    def run_step(title: str, command: str, live: bool = False) -> None:
        result = runner.try_to(command)
        assert result.code == 0, f"{command}\n{result.output}"

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        quickstart.run_all_steps(Path("notes"), run_step)
    shutil.copytree(folder / "runs" / "quickstart", folder / "runs" / "6B")
    write_random(folder / "runs" / "quickstart_t5" / "checkpoints", "byte", 257, **T5)
    return folder


@pytest.fixture(scope="module")
def trained() -> set[Run]:
    """The training commands that have run, because several sources print the same one."""
    return set()


@pytest.mark.parametrize("source", [name for name, commands in SOURCES.items() if commands])
def test_every_command_runs(
    source: str, clone: Path, trained: set[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = clone_of(clone, tmp_path, trained, monkeypatch)
    if source.endswith(".md"):
        for name, text in page_files(ROOT / source).items():
            Path(name).write_text(text)
    for command in SOURCES[source]:
        if not any(re.match(pattern, command) for pattern in NOT_RUN):
            runner.run(command)


@pytest.mark.parametrize("page", [page.name for page in PAGES if page_sessions(page)])
def test_every_console_session_prints_what_the_page_shows(
    page: str, clone: Path, trained: set[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`...` in a page stands for any text."""
    runner = clone_of(clone, tmp_path, trained, monkeypatch)
    for command, shown in page_sessions(ROOT / "docs" / page):
        result = runner.try_to(command)
        # Lines may be divided otherwise in the page.
        expected = ".*".join(re.escape(" ".join(part.split())) for part in shown.split("..."))
        assert re.fullmatch(expected, " ".join(result.output.split())), f"{command}\n{result.output}"
        assert result.code == (2 if "error: " in shown else 0), command


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_every_exception_is_needed(pattern: str) -> None:
    printed = [command for commands in SOURCES.values() for command in commands]
    assert any(re.match(pattern, command) for command in printed), NOT_RUN[pattern]


def test_commands_are_found_in_all_kinds_of_sources() -> None:
    assert len(SOURCES["README.md"]) >= 12
    assert len(SOURCES["docs/data.md"]) >= 3
    assert len(SOURCES["pretrain --help"]) == 4
    assert len(SOURCES["examples/single_node.sh"]) == 1
    assert len(SOURCES[NEXT_STEPS]) >= 5


def clone_of(clone: Path, scratch: Path, trained: set[Run], monkeypatch: pytest.MonkeyPatch) -> CommandRunner:
    """Copy the clone, make it the current folder, and return an runner in it."""
    shutil.copytree(clone, scratch / "clone", symlinks=True)
    monkeypatch.chdir(scratch / "clone")
    return CommandRunner(scratch, trained)
