"""tools/find_learning_rate.py like a user runs it: on several ranks, with its table, picture and suggestions."""

import csv
import sys
from pathlib import Path

import pytest
from support.commands import config_file, run_command
from support.job import Job
from torch.distributed.run import get_args_parser

from megagpt.commands.find_learning_rate import growing_rates, main
from megagpt.errors import ConfigError


def test_rates_grow_by_the_same_factor() -> None:
    assert growing_rates(1e-4, 1e-1, 4) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])


@pytest.mark.parametrize(("lowest", "highest", "steps"), [(1.0, 0.1, 10), (0.1, 0.1, 10), (0.0, 1.0, 10), (0.1, 1.0, 1)])
def test_rates_that_do_not_grow_are_refused(lowest: float, highest: float, steps: int) -> None:
    with pytest.raises(ConfigError, match="expected 0 < --min-rate < --max-rate, --steps 2 or more"):
        growing_rates(lowest, highest, steps)


def test_wrong_rates_are_refused_in_one_line_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "none.json", "--output", str(tmp_path / "r"), "--min-rate", "1", "--max-rate", "0.1"]) == 2
    assert "expected 0 < --min-rate < --max-rate" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["--config", "none.json", "--output", str(tmp_path / "r")]) == 2
    assert "none.json: no such config: No such file or directory" in capsys.readouterr().err


def test_the_tool_can_be_started_as_a_script(tmp_path: Path) -> None:
    result = run_command(sys.executable, "tools/find_learning_rate.py", "--config", "none.json", "--output", tmp_path / "r")
    assert result.returncode == 2
    assert result.stderr.startswith("error: none.json: no such config: No such file or directory")
    assert result.stderr.count("\n") == 1


def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--config", "none.json", "--output", str(tmp_path / "file" / "r")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_torchrun_passes_all_options_on() -> None:
    """It parses abbreviations of its own options even after the name of the script."""
    options = ["--config", "c.json", "--output", "r", "--min-rate", "1e-4", "--max-rate", "10", "--steps", "30", "--set", "a=1"]
    args = get_args_parser().parse_args(["--nproc_per_node", "2", "tools/find_learning_rate.py", *options])
    assert args.training_script_args == options


def test_two_ranks_write_the_table_and_the_picture_and_nothing_of_the_run(tmp_path: Path) -> None:
    config = config_file(tmp_path / "run", checkpoint={"dir": str(tmp_path / "run" / "checkpoints")})
    rates = ["--steps", "30", "--min-rate", "1e-4", "--max-rate", "10", "--set", "training.steps=2"]  # --steps counts
    arguments = ["--config", str(config), "--output", str(tmp_path / "run" / "rates"), *rates]
    job = Job(2, arguments, tmp_path / "logs", command="find_learning_rate")
    assert job.finish(60) == [0, 0], job.output()
    assert "steepest descent" in job.output() and "rates.png" in job.output()
    with (tmp_path / "run" / "rates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 10
    assert float(rows[0]["learning_rate"]) == pytest.approx(1e-4)
    assert float(rows[1]["learning_rate"]) == pytest.approx(1e-4 * 1e5 ** (1 / 29))
    assert min(float(row["loss"]) for row in rows) < float(rows[0]["loss"])
    assert (tmp_path / "run" / "rates.png").read_bytes().startswith(b"\x89PNG")
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["corpus.bin", "corpus.idx", "rates.csv", "rates.png", "run.json"]
