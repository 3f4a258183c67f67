"""Signals and the end of the hours: saved at the next step, exit code 75, and the next start ends as an undisturbed run."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from commands.test_pretrain import config_file
from support.job import Job

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.load import Reader
from megagpt.resilience.interruption import REQUEUE

LONG = 1_000_000


def slow_steps(rank: int) -> None:
    """A tenth of a second in each step, so that there is time to interrupt a run of few."""
    from megagpt.resilience.health import Verdict
    from megagpt.training.trainer import Batch, Trainer

    advance = Trainer.advance

    def slower(self: Trainer, batch: Batch) -> Verdict:
        time.sleep(0.1)
        return advance(self, batch)

    Trainer.advance = slower  # type: ignore[method-assign]


def start(folder: Path, steps: int, logs: str = "logs", **sections: dict[str, object]) -> Job:
    """Two ranks, data parallel with ZeRO-1."""
    folder.mkdir(exist_ok=True)
    checkpoint = {"dir": str(folder / "checkpoints"), **sections.pop("checkpoint", {})}
    config = config_file(folder, training={"steps": steps, **sections.pop("training", {})}, checkpoint=checkpoint, **sections)
    return Job(2, ["--config", str(config)], folder / logs, slow_steps)


def state(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    reader = Reader(folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip())
    return {
        (kind, name): reader.read(kind, name, Box((0,) * len(record.shape), tuple(record.shape)))
        for name, record in reader.manifest.tensors.items()
        for kind in record.kinds
    }


@pytest.mark.parametrize(("number", "told"), [(signal.SIGTERM, [0, 1]), (signal.SIGUSR1, [1])])
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on_bit_for_bit(
    number: signal.Signals, told: list[int], tmp_path: Path
) -> None:
    assert start(tmp_path / "straight", 12).finish(60) == [0, 0]
    job = start(tmp_path / "halves", 12)
    job.wait_for("step  4/12")
    job.send(number, told)
    assert job.finish(60) == [REQUEUE, REQUEUE]
    assert "with exit code 75; started again it goes on from here" in job.output()
    saved = int((tmp_path / "halves" / "checkpoints" / "latest").read_text().strip()[5:])
    assert 4 <= saved < 12
    again = start(tmp_path / "halves", 12, "again")
    assert again.finish(60) == [0, 0]
    assert f"step_{saved:08d}: step {saved}, sample {saved * 8};" in again.output()
    straight, halves = state(tmp_path / "straight"), state(tmp_path / "halves")
    assert straight.keys() == halves.keys()
    assert all(torch.equal(straight[key], halves[key]) for key in straight)


def test_the_end_of_the_hours_does_the_same(tmp_path: Path) -> None:
    begun = time.monotonic()
    job = start(tmp_path, LONG, training={"max_hours": 6 / 3600})
    assert job.finish(60) == [REQUEUE, REQUEUE]
    assert time.monotonic() - begun > 6
    assert "ends early (training.max_hours 0.00166667) with exit code 75" in job.output()
    assert (tmp_path / "checkpoints" / "latest").exists()


def test_a_second_signal_ends_a_rank_at_once_even_in_a_collective_that_never_returns(tmp_path: Path) -> None:
    job = start(tmp_path, LONG)
    job.wait_for("step       2/")
    job.send(signal.SIGSTOP, [1])
    job.ranks[0].join(1)  # it waits for rank 1 by now
    job.send(signal.SIGTERM, [0])
    job.ranks[0].join(1)
    assert job.ranks[0].is_alive()
    job.send(signal.SIGTERM, [0])
    job.ranks[0].join(5)
    assert job.ranks[0].exitcode == 128 + signal.SIGTERM
    assert "SIGTERM again: ending at once" in job.output()
    job.send(signal.SIGKILL, [1])
    job.finish(10)


def test_without_a_folder_nothing_is_saved_and_the_exit_code_is_no_wish_to_go_on(tmp_path: Path) -> None:
    job = start(tmp_path, LONG, checkpoint={"dir": None})
    job.wait_for("step       2/")
    job.send(signal.SIGTERM)
    assert job.finish(60) == [128 + signal.SIGTERM] * 2
    assert "nothing is saved, since checkpoint.dir is not set" in job.output()


def test_a_limit_of_hours_needs_a_folder(tmp_path: Path) -> None:
    from megagpt.config import load_config
    from megagpt.errors import ConfigError

    with pytest.raises(ConfigError, match="training.max_hours: saves when the time is over, but checkpoint.dir is not set"):
        load_config(config_file(tmp_path), ["training.max_hours=1"])


def test_metrics_of_an_interrupted_run_are_those_of_one(tmp_path: Path) -> None:
    job = start(tmp_path, 8)
    job.wait_for("step 3/8")
    job.send(signal.SIGTERM)
    assert job.finish(60) == [REQUEUE, REQUEUE]
    assert start(tmp_path, 8).finish(60) == [0, 0]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
