"""tools/draw_schedule.py: its tables, the pictures in docs/schedules.md, and errors in one line."""

from pathlib import Path

import pytest

from megagpt.commands.draw_schedule import main, read_costs
from megagpt.errors import ConfigError
from megagpt.schedules.registry import SCHEDULES

DOCS = Path(__file__).parents[2] / "docs"


def test_one_schedule_is_printed_rank_by_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--schedule", "1f1b", "--stages", "2", "--micro-batches", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1f1b: 2 ranks, 3 micro-batches, 12 per step",
        "rank    idle   in flight",
        "   0   25.0%           2",
        "   1   25.0%           1",
    ]


def test_costs_and_transfer_times_are_used(capsys: pytest.CaptureFixture[str]) -> None:
    costs = ["--costs", "F=2,I=1.5,W=1", "--transfer", "0.25"]
    assert main(["--schedule", "zb_h1", "--stages", "2", "--micro-batches", "1", *costs]) == 0
    assert "1 micro-batch, 8.5 per step" in capsys.readouterr().out  # F 2, 0.25, F 2, I 1.5, 0.25, I 1.5, W 1


def test_interleaved_schedules_have_two_chunks_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--schedule", "interleaved_1f1b", "--stages", "2", "--micro-batches", "4"]
    assert main(run) == main([*run, "--virtual-stages", "2"]) == 0
    default, explicit = capsys.readouterr().out.split("interleaved_1f1b: ")[1:]
    assert default == explicit
    assert default.startswith("2 ranks, 4 micro-batches, 13.5 per step")  # 12, and a bubble of 3 / 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_docs_show_what_the_tool_draws(name: str, tmp_path: Path) -> None:
    output = tmp_path / "picture.svg"
    assert main(["--schedule", name, "--stages", "4", "--micro-batches", "8", "--output", str(output)]) == 0
    assert (DOCS / "schedules" / f"{name}.svg").read_text() == output.read_text(), "see docs/schedules.md for the command"
    assert f"schedules/{name}.svg" in (DOCS / "schedules.md").read_text()


def test_the_table_in_the_docs_is_what_the_tool_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--stages", "4", "--micro-batches", "4", "8", "16"]) == 0
    table = capsys.readouterr().out
    assert table in (DOCS / "schedules.md").read_text(), "see docs/schedules.md for the command"
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {name}" for name in SCHEDULES]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--schedule", "1f1b", "--micro-batches", "4", "8"], "--micro-batches: 2 numbers with --schedule, which takes one"),
        (["--micro-batches", "4", "--output", "a.svg"], "--output: a picture shows one schedule; add --schedule"),
        (["--schedule", "zbv", "--micro-batches", "0"], "zbv: 4 ranks and 0 micro-batches; at least one of each is needed"),
        (["--schedule", "zbv", "--micro-batches", "4", "--virtual-stages", "3"], "zbv: virtual_stages must be 1 or 2, not 3"),
        (["--schedule", "zbv", "--micro-batches", "4", "--output", "a.png"], "--output a.png: pictures are SVG files"),
        (
            ["--schedule", "zbv", "--micro-batches", "4", "--output", "no/a.svg"],
            "--output no/a.svg: cannot be written: No such",
        ),
        (
            ["--schedule", "zbv", "--micro-batches", "4", "--costs", "F=1"],
            "--costs F=1: expected three times, F above 0",
        ),
        (["--micro-batches", "4", "--stages", "0"], "0 ranks and 4 micro-batches"),
        (["--micro-batches", "4", "--transfer", "-1"], "--transfer -1.0: expected 0 or more"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--stages", "4", *arguments]) == 2
    printed, error = capsys.readouterr()
    assert printed == ""  # no result before an error
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1


def test_costs_are_three_times_and_that_of_the_forward_is_not_zero() -> None:
    assert read_costs("F=1,I=1.25,W=.75") == (1, 1.25, 0.75)
    assert read_costs("F=1,I=0,W=0") == (1, 0, 0)
    for text in ("", "1,1,1", "F=0,I=1,W=1", "F=1,I=-1,W=1", "F=1,I=1,W=1,B=2", "F=1,W=1,I=1", "F=nan,I=1,W=1"):
        with pytest.raises(ConfigError, match="expected three times"):
            read_costs(text)
