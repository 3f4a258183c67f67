"""The rank that the others wait for is named, whatever stage and group it is in."""

import contextlib
import io
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint.test_resume import config_of
from support.pool import Pool
from support.runs import Tree, corpus, open_trainer

from megagpt.config import Config
from megagpt.parallel.topology import Layout
from megagpt.resilience.stragglers import summarise


def test_a_rank_is_measured_beside_those_of_its_own_stage() -> None:
    """Stage 1 has twice the work by right; in stage 0 a rank takes three times its peers' time."""
    found = summarise([1.0, 3.0, 1.1, 1.0, 2.0, 2.1, 2.0, 1.9], Layout(tensor=2, pipeline=2, data=2))
    assert (found.rank, found.slowest, found.factor) == (1, 3.0, pytest.approx(3.0))
    assert (found.fastest, found.median) == (1.0, 1.95)


def test_of_two_ranks_the_slower_is_measured_against_the_faster() -> None:
    assert summarise([1.0, 2.0], Layout(data=2)).factor == pytest.approx(2.0)


def test_single_ranks_of_stages_are_measured_against_all() -> None:
    found = summarise([1.0, 1.0, 4.0], Layout(pipeline=3))
    assert (found.rank, found.factor) == (2, pytest.approx(4.0))


def slow_on(config: Config, rank: int) -> tuple[list[Tree], str]:
    """Train with 0.2 s of more work in each forward of a rank; the records and what was said."""
    said, records = io.StringIO(), []
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        trainer = open_trainer(config)

        class Keep:
            def step(self, record: Tree) -> None:
                records.append(record)

            def close(self) -> None:
                pass

        trainer.logger = Keep()  # type: ignore[assignment]

        def delay(*_: Any) -> None:
            time.sleep(0.2)

        if trainer.topology.rank == rank:
            next(iter(trainer.engine.chunks.values())).register_forward_pre_hook(delay)
        trainer.train()
        trainer.close()
    return records, said.getvalue()


@pytest.mark.parametrize(("parallel", "stage"), [({}, 1), ({"pipeline": 2}, 2)])
def test_a_slow_rank_is_named_in_the_log(parallel: Tree, stage: int, ranks: Pool, tmp_path: Path) -> None:
    config = config_of(tmp_path, corpus(tmp_path), parallel, stage, 4, checkpoint={"dir": None})
    records, said = ranks.run(4, slow_on, config, 2)[0]
    assert [record["slowest_rank"] for record in records] == [2] * 4
    assert all(record["own_seconds_slowest"] > 0.2 > record["own_seconds_fastest"] for record in records)
    assert "straggler: rank 2 on" in said


def test_of_ranks_that_wait_for_each_other_all_are_named(ranks: Pool, tmp_path: Path) -> None:
    config = config_of(tmp_path, corpus(tmp_path), {"tensor": 2}, 1, 4, checkpoint={"dir": None})
    records, said = ranks.run(4, slow_on, config, 2)[0]
    assert {record["slowest_rank"] for record in records} <= {2, 3}
    assert "(tensor ranks 2, 3 wait for each other: one of them)" in said
