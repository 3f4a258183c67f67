"""The lines that a run prints."""

import io
import math

import pytest
from support.records import EVALUATION, train_record

from megagpt.training.loggers.console import ConsoleLogger


def console_line(record: dict[str, float], total: int = 5000) -> str:
    stream = io.StringIO()
    ConsoleLogger(total, stream).step(record)
    return stream.getvalue()


def test_a_training_line_has_progress_loss_speed_and_remaining_time() -> None:
    line = console_line(train_record(200, step_seconds=0.9))
    assert line == (
        "step  200/5000 | loss 2.5000 | lr 3.000e-04 | grad norm 0.750 | 20,480 tokens/s | 0.900 s/step | 1:12:00 left\n"
    )


def test_a_training_line_has_the_mfu_if_it_is_known() -> None:
    line = console_line(train_record(200, step_seconds=0.9, tflops_per_device=394.7, mfu=0.399))
    assert line.endswith("| 0.900 s/step | 395 TFLOP/s, MFU 39.9% | 1:12:00 left\n")


def test_an_evaluation_line_has_loss_and_perplexity() -> None:
    assert console_line(EVALUATION) == "step   30/5000 | eval loss 2.2500 | perplexity 9.49\n"


def test_a_line_of_the_test_split_names_the_split() -> None:
    line = console_line({"step": 30, "test_loss": 2.25, "test_perplexity": math.exp(2.25)})
    assert line == "step   30/5000 | test loss 2.2500 | perplexity 9.49\n"


def test_a_nan_loss_is_printed_as_nan() -> None:
    assert "| loss nan |" in console_line(train_record(1, loss=math.nan, grad_norm=math.nan))
    assert "eval loss nan | perplexity nan" in console_line({"step": 1, "eval_loss": math.nan, "eval_perplexity": math.nan})


def test_an_unknown_speed_leaves_the_remaining_time_open() -> None:
    assert console_line(train_record(1, step_seconds=math.inf)).endswith("| ? left\n")


def test_lines_go_to_the_standard_output_of_the_moment(capsys: pytest.CaptureFixture[str]) -> None:
    logger = ConsoleLogger(9)
    logger.step(EVALUATION)
    logger.rewind(0)
    logger.close()
    assert capsys.readouterr().out == "step 30/9 | eval loss 2.2500 | perplexity 9.49\n"
