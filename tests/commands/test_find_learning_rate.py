"""tools/find_learning_rate.py as a user meets it: under a launcher, with its table, picture and advice."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from commands.test_pretrain import ENVIRONMENT, ROOT, config_file

BIN = Path(sys.executable).parent


def test_wrong_rates_are_refused_in_one_line_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megagpt.commands.find_learning_rate import main

    assert main(["--config", "none.json", "--output", str(tmp_path / "r"), "--min-rate", "1", "--max-rate", "0.1"]) == 2
    assert "expected 0 < --min-rate < --max-rate" in capsys.readouterr().err
    assert main(["--config", "none.json", "--output", str(tmp_path / "r")]) == 2
    assert "none.json: the config cannot be read" in capsys.readouterr().err


@pytest.mark.launch
def test_two_ranks_write_the_table_and_the_picture_and_leave_the_run_alone(tmp_path: Path) -> None:
    config = config_file(tmp_path, checkpoint={"dir": str(tmp_path / "checkpoints")})
    command = [BIN / "torchrun", "--nproc_per_node", "2", "--master_port", "29617", "tools/find_learning_rate.py"]
    rest = ["--config", config, "--output", tmp_path / "rates", "--steps", "30", "--min-rate", "1e-4", "--max-rate", "10"]
    result = subprocess.run(
        [*map(str, command), *map(str, rest)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "steepest descent" in result.stdout and "rates.png" in result.stdout
    with (tmp_path / "rates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["learning_rate"]) == pytest.approx(1e-4)
    assert float(rows[1]["learning_rate"]) == pytest.approx(1e-4 * 1e5 ** (1 / 29))
    assert min(float(row["loss"]) for row in rows) < float(rows[0]["loss"])
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "corpus.bin",
        "corpus.idx",
        "rates.csv",
        "rates.png",
        "run.json",
    ]
