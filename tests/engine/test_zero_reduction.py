"""A chunk's gradients are reduced as soon as they are complete; under ZeRO-2 a rank then keeps only its own share.

A phase observer records each phase of a step and the bytes of gradients at its start.
"""

from typing import NamedTuple

import pytest
import torch
from support.phases import PhaseObserver
from support.pool import Pool
from support.runs import create_topology, local_micro_batches, tiny_config, train_step

from megagpt.config import Config
from megagpt.engine.engine import Engine


class Reduction(NamedTuple):
    """One chunk's reduction."""

    remaining_backwards: int
    """Backwards of this rank that come after it."""
    bytes_before: int
    """Gradients of this rank."""
    bytes_after: int


def reductions_of_a_step(config: Config) -> tuple[list[Reduction], int]:
    """Return the reductions of one step on this rank, and the bytes of the gradients of all parameters."""
    phase = PhaseObserver()
    engine = Engine(config, create_topology(config), torch.device("cpu"), phase)
    phases: list[tuple[str, int]] = []

    def observe(name: str) -> None:
        gradients = [parameter.grad for parameter in engine.parameters if parameter.grad is not None]
        phases.append((name, sum(gradient.numel() * gradient.element_size() for gradient in gradients)))

    phase.observe = observe
    train_step(engine, 0)
    reductions = [
        Reduction(sum(is_backward(name) for name, _ in phases[index:]), bytes_before, phases[index + 1][1])
        for index, (name, bytes_before) in enumerate(phases)
        if name.startswith("gradient reduction of stage")
    ]
    all_bytes = sum(parameter.numel() * 4 for parameter in engine.parameters)
    n_micro_batches = len(local_micro_batches(config, 0, engine.topology))
    assert sum(is_backward(name) for name, _ in phases) == len(engine.chunks) * n_micro_batches
    engine.close()
    return reductions, all_bytes


def is_backward(phase: str) -> bool:
    return phase.startswith(("backward of", "input backward of"))


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv"])
def test_a_chunk_is_reduced_before_the_others_are_done(schedule: str, ranks: Pool) -> None:
    chunks = {"virtual_stages": 2} if schedule.startswith("interleaved") else {}
    config = tiny_config(parallel={"pipeline": 2, "schedule": schedule, **chunks}, zero={"stage": 2})
    results = [reductions for reductions, _ in ranks.run(4, reductions_of_a_step, config)]
    for reductions in results:
        assert len(reductions) == 2
        assert reductions[-1].remaining_backwards == 0
    # Backwards of the other chunk, during which the reduction may run.
    assert max(reductions[0].remaining_backwards for reductions in results) >= 1


def test_zero_2_frees_what_other_ranks_own_and_zero_1_does_not(ranks: Pool) -> None:
    for stage in (1, 2):
        config = tiny_config(zero={"stage": stage}, model={"tie_embeddings": False})
        results = ranks.run(4, reductions_of_a_step, config)
        all_bytes = results[0][1]
        for reductions, own_bytes in results:
            assert own_bytes == all_bytes
            assert [reduction.bytes_before for reduction in reductions] == [all_bytes]
        after = [reduction.bytes_after for reductions, _ in results for reduction in reductions]
        if stage == 1:
            assert after == [all_bytes] * 4
        else:  # both ranks that share a parameter keep it
            assert sum(after) < 1.5 * all_bytes and max(after) < all_bytes / 2
