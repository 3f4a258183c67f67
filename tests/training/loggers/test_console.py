"""The lines that a run prints."""

import io
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.records import EVALUATION, train_record
from support.runs import Tree

from megagpt.training.loggers.console import ConsoleLogger


@pytest.fixture(autouse=True)
def time_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that is two hours ahead of UTC."""
    monkeypatch.setenv("TZ", "XYZ-2")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def console_line(record: Tree, total: int = 5000, device: str = "cpu") -> str:
    stream = io.StringIO()
    ConsoleLogger(total, device, stream).step({**record, "time": "2026-11-27T12:31:07.250+00:00"})
    return stream.getvalue()


def test_a_training_line_has_time_progress_loss_speed_and_remaining_time() -> None:
    line = console_line(train_record(200, step_seconds=0.9))
    assert line == (
        "14:31:07 step  200/5000 | loss 2.5000 | lr 3.00e-04 | grad norm 0.750 | 20,480 tokens/s | 0.900 s/step | "
        "1:12:00 left\n"
    )


def test_several_devices_have_the_speed_of_one_device() -> None:
    line = console_line(train_record(200, tokens_per_second_per_device=2560.0))
    assert "| 20,480 tokens/s (2,560/device) |" in line


def test_a_line_of_several_cpus_fits_in_a_terminal() -> None:
    """The second line of make quickstart in README.md."""
    record = train_record(
        10,
        loss=7.1323,
        learning_rate=1.5e-3,
        grad_norm=1.526,
        tokens_per_second=6761,
        tokens_per_second_per_device=845.1,
        step_seconds=0.606,
        peak_memory_gib=0.4,
    )
    line = console_line(record, total=300)
    assert len(line) <= 128
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    assert line[len("14:31:07 ") :] in readme


def test_a_line_of_a_gpu_has_its_memory() -> None:
    assert "| 61.3 GiB |" in console_line(train_record(200, peak_memory_gib=61.26), device="cuda")
    assert "GiB" not in console_line(train_record(200, peak_memory_gib=61.26))
    assert "GiB" not in console_line(train_record(200, peak_memory_gib=None), device="cuda")


def test_a_training_line_has_the_mfu_if_it_is_known() -> None:
    record = train_record(200, step_seconds=0.9, tflops_per_device=394.7, mfu=0.399, peak_memory_gib=61.26)
    line = console_line(record, device="cuda")
    assert line.endswith("| 0.900 s/step | 395 TFLOP/s per device, MFU 39.9% | 61.3 GiB | 1:12:00 left\n")


def test_an_evaluation_line_has_loss_and_perplexity() -> None:
    assert console_line(EVALUATION) == "14:31:07 step   30/5000 | eval loss 2.2500 | perplexity 9.49\n"


def test_a_line_of_the_test_split_names_the_split() -> None:
    line = console_line({"step": 30, "test_loss": 2.25, "test_perplexity": math.exp(2.25)})
    assert line == "14:31:07 step   30/5000 | test loss 2.2500 | perplexity 9.49\n"


def test_a_nan_loss_is_printed_as_nan() -> None:
    assert "| loss nan |" in console_line(train_record(1, loss=math.nan, grad_norm=math.nan))
    assert "eval loss nan | perplexity nan" in console_line({"step": 1, "eval_loss": math.nan, "eval_perplexity": math.nan})


def test_an_unknown_speed_leaves_the_remaining_time_open() -> None:
    assert console_line(train_record(1, step_seconds=math.inf)).endswith("| ? left\n")


def test_lines_go_to_the_standard_output_of_the_moment(capsys: pytest.CaptureFixture[str]) -> None:
    logger = ConsoleLogger(9)
    logger.step({**EVALUATION, "time": "2026-11-27T23:59:59.999+00:00"})
    logger.rewind(0)
    logger.close()
    assert capsys.readouterr().out == "01:59:59 step 30/9 | eval loss 2.2500 | perplexity 9.49\n"
