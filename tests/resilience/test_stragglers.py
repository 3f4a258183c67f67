"""The rank that the others wait for is named, whatever its stage and group."""

import contextlib
import io
import time
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import run_config
from support.pool import Pool
from support.records import RecordList
from support.runs import Tree, corpus, open_trainer

from megagpt.config import Config
from megagpt.parallel.topology import Layout
from megagpt.resilience.stragglers import summarise


def test_a_rank_is_compared_with_the_ranks_of_its_stage() -> None:
    """Stage 1 has twice the work of stage 0; in stage 0 one rank takes three times as long as its peers."""
    summary = summarise([1.0, 3.0, 1.1, 1.0, 2.0, 2.1, 2.0, 1.9], Layout(tensor=2, pipeline=2, data=2))
    assert (summary.rank, summary.max, summary.factor) == (1, 3.0, pytest.approx(3.0))
    assert (summary.min, summary.median) == (1.0, 1.95)


def test_the_slower_of_two_ranks_is_compared_with_the_faster() -> None:
    assert summarise([1.0, 2.0], Layout(data=2)).factor == pytest.approx(2.0)


def test_a_rank_alone_in_its_stage_is_compared_with_all_ranks() -> None:
    summary = summarise([1.0, 1.0, 4.0], Layout(pipeline=3))
    assert (summary.rank, summary.factor) == (2, pytest.approx(4.0))


def train_with_slow_rank(config: Config, rank: int) -> tuple[list[Tree], str]:
    """Train with 0.2 s of extra work in each forward of one rank; return the records and standard error."""
    stderr, log = io.StringIO(), RecordList()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        trainer = open_trainer(config)
        trainer.logger = log

        def delay(*_: Any) -> None:
            time.sleep(0.2)

        if trainer.topology.rank == rank:
            next(iter(trainer.engine.chunks.values())).register_forward_pre_hook(delay)
        trainer.train()
        trainer.close()
    return log.records, stderr.getvalue()


@pytest.mark.parametrize(("parallel", "stage"), [({}, 1), ({"pipeline": 2}, 2)])
def test_a_slow_rank_is_named_in_the_records_and_in_a_warning(parallel: Tree, stage: int, ranks: Pool, tmp_path: Path) -> None:
    config = run_config(tmp_path, corpus(tmp_path), parallel, stage, 4, checkpoint={"dir": None})
    records, stderr = ranks.run(4, train_with_slow_rank, config, 2)[0]
    assert [record["slowest_rank"] for record in records] == [2] * 4
    assert all(record["compute_seconds_max"] > 0.2 > record["compute_seconds_min"] for record in records)
    assert "straggler: rank 2 (" in stderr and "x the median of its stage" in stderr


def test_tensor_ranks_wait_for_each_other_so_both_are_named(ranks: Pool, tmp_path: Path) -> None:
    config = run_config(tmp_path, corpus(tmp_path), {"tensor": 2}, 1, 4, checkpoint={"dir": None})
    records, stderr = ranks.run(4, train_with_slow_rank, config, 2)[0]
    assert {record["slowest_rank"] for record in records} <= {2, 3}
    assert "(or another of the tensor ranks 2, 3)" in stderr
