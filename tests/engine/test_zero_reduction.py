"""A chunk's gradients leave as soon as they are whole; under ZeRO-2 a rank then keeps those of its own share alone."""

from typing import Any

import pytest
import torch
from support.pool import Pool
from support.runs import micro_batches, tiny_config

from megagpt.config import Config
from megagpt.engine.engine import Engine
from megagpt.parallel.topology import Topology
from megagpt.pipeline.executor import _Step


def watched(config: Config) -> Any:
    """One step on this rank: at each stage's reduction the backwards that are still to come, the bytes of gradients
    before and after it; and all gradients' bytes."""
    topology = Topology.create(config.parallel.tensor, config.parallel.pipeline)
    engine = Engine(config, topology, torch.device("cpu"))
    batches = micro_batches(config, 0, topology.dp_cp_rank, topology.layout.dp_cp)
    seen, backwards = [], [0]
    reduce_stage, backward = engine._reduce_stage, _Step.backward

    def held() -> int:
        return sum(p.grad.numel() * p.grad.element_size() for p in engine.parameters if p.grad is not None)

    def counted(step: _Step, stage: int, index: int) -> None:
        backwards[0] += 1
        backward(step, stage, index)

    def watched_stage(stage: int) -> None:
        before = held()
        reduce_stage(stage)
        seen.append((len(engine.chunks) * len(batches) - backwards[0], before, held()))

    engine._reduce_stage = watched_stage  # type: ignore[method-assign]
    _Step.backward = counted  # type: ignore[method-assign]
    try:
        engine.train_step(batches, count_labels(config, 0), 1e-3)
    finally:
        _Step.backward = backward  # type: ignore[method-assign]
    whole = sum(parameter.numel() * 4 for parameter in engine.parameters)
    engine.close()
    return seen, whole


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv"])
def test_a_chunk_is_reduced_before_the_others_are_done(schedule: str, ranks: Pool) -> None:
    chunks = {"virtual_stages": 2} if schedule.startswith("interleaved") else {}
    config = tiny_config(parallel={"pipeline": 2, "schedule": schedule, **chunks}, zero={"stage": 2})
    for seen, _ in ranks.run(4, watched, config):
        assert len(seen) == 2
        assert seen[-1][0] == 0
    first = [seen[0][0] for seen, _ in ranks.run(4, watched, config)]
    assert max(first) >= 1  # backwards of the other chunk, over which the reduction may run


def test_zero_2_frees_what_others_own_and_zero_1_does_not(ranks: Pool) -> None:
    for stage in (1, 2):
        config = tiny_config(zero={"stage": stage}, model={"tie_embeddings": False})
        results = ranks.run(4, watched, config)
        for seen, whole in results:
            assert [before for _, before, _ in seen] == [whole]
        left = [after for seen, _ in results for _, _, after in seen]
        if stage == 1:
            assert left == [results[0][1]] * 4
        else:  # a parameter that two ranks share is held by both
            assert sum(left) < 1.5 * results[0][1] and max(left) < results[0][1] / 2
