"""Several loggers behave like one, and a tracker that fails does not end the run."""

from datetime import datetime, timedelta, timezone

import pytest
from support.runs import Tree

from megagpt.training.loggers.base import FanOut, Tolerant


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


class Broken:
    """A logger that fails in every call."""

    def step(self, record: Tree) -> None:
        raise OSError(28, "No space left on device")

    def rewind(self, step: int) -> None:
        raise RuntimeError("no connection\nsecond line")

    def close(self) -> None:
        raise ValueError("closed")


def test_every_logger_gets_every_call_and_the_time_of_each_record() -> None:
    recorders = [Recorder(), Recorder()]
    logger = FanOut(recorders)
    before = datetime.now(timezone.utc)
    logger.step({"step": 3, "loss": 2.5})
    logger.rewind(2)
    logger.close()
    first, second = (recorder.calls for recorder in recorders)
    assert first == second
    record, *others = first
    assert isinstance(record, dict) and others == [2, "close"]
    assert list(record) == ["step", "loss", "time"] and (record["step"], record["loss"]) == (3, 2.5)
    time = datetime.fromisoformat(record["time"])
    assert time.utcoffset() == timedelta(0)
    assert before - timedelta(milliseconds=1) <= time <= datetime.now(timezone.utc)


def test_no_loggers_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    logger = FanOut()
    logger.step({"step": 1, "loss": 2.5})
    logger.rewind(0)
    logger.close()
    assert capsys.readouterr().out == ""


def test_the_errors_of_a_tracker_are_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    logger = Tolerant(Broken(), "logging.wandb")
    logger.step({"step": 1})
    logger.step({"step": 2})
    logger.rewind(1)
    logger.close()
    assert capsys.readouterr().err == (
        "warning: logging.wandb: OSError: [Errno 28] No space left on device; training continues, but records may be missing "
        "there\n"
    )


def test_a_tracker_that_works_gets_every_call() -> None:
    recorder = Recorder()
    logger = Tolerant(recorder, "logging.wandb")
    logger.step({"step": 3})
    logger.rewind(2)
    logger.close()
    assert recorder.calls == [{"step": 3}, 2, "close"]


@pytest.mark.parametrize("call", ["rewind", "close"])
def test_every_call_of_a_tracker_may_fail(call: str, capsys: pytest.CaptureFixture[str]) -> None:
    logger = Tolerant(Broken(), "logging.tensorboard")
    logger.rewind(1) if call == "rewind" else logger.close()
    assert capsys.readouterr().err.startswith("warning: logging.tensorboard: ")
