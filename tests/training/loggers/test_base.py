"""Several loggers behave like one."""

import pytest
from support.runs import Tree

from megagpt.training.loggers.base import FanOut


class Recorder:
    """A logger that stores its calls."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def step(self, record: Tree) -> None:
        self.calls.append(record)

    def rewind(self, step: int) -> None:
        self.calls.append(step)

    def close(self) -> None:
        self.calls.append("close")


def test_every_logger_gets_every_call() -> None:
    recorders = [Recorder(), Recorder()]
    logger = FanOut(recorders)
    logger.step({"step": 3, "loss": 2.5})
    logger.rewind(2)
    logger.close()
    assert [recorder.calls for recorder in recorders] == [[{"step": 3, "loss": 2.5}, 2, "close"]] * 2


def test_no_loggers_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    logger = FanOut()
    logger.step({"step": 1, "loss": 2.5})
    logger.rewind(0)
    logger.close()
    assert capsys.readouterr().out == ""
