"""Predicted memory against what real ranks hold: parameter, gradient and optimizer tensors, and what autograd saves.

Saved tensors are counted by hooks, each storage once, from the forward until the graph is freed; then what the delayed jobs of
weight gradients hold until they have run.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.exhaustive import chosen, more
from support.pool import Pool
from support.runs import create_engine, tiny_config, train_step
from torch import Tensor

from megagpt.config import Config
from megagpt.engine.engine import Engine
from megagpt.planner.memory import memory_by_rank, predict_memory
from megagpt.planner.stages import StageModel
from megagpt.planner.step_simulation import Held, peaks_in_flight
from megagpt.planner.strategy import Strategy
from megagpt.schedules.registry import SCHEDULES

WORLD = 8
MODEL = {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_positions": 32, "vocab_size": 250}


def config_of(schedule: str = "1f1b", zero: int = 1, pipeline: int = 2) -> Config:
    chunks = {"virtual_stages": 2} if SCHEDULES[schedule].interleaved else {}
    return tiny_config(
        model=MODEL,
        parallel={"tensor": 2, "pipeline": pipeline, "schedule": schedule, "sequence_parallel": True, **chunks},
        zero={"stage": zero},
        training={"micro_batch_size": 2, "global_batch_size": 16},
    )


class LiveStorages:
    """Bytes of the storages that are held, each counted once, and their peak."""

    def __init__(self, engine: Engine) -> None:
        self.holders: Counter[int] = Counter()
        self.bytes = self.peak = 0
        self.engine = engine

    def hold(self, owner: Any, tensor: Tensor) -> None:
        """Count the storage of `tensor` until `owner` is gone, unless a parameter has it now: ZeRO-3 moves parameters."""
        key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if key in storages(self.engine.parameters):
            return
        if not self.holders[key]:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self.holders[key] += 1
        weakref.finalize(owner, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            self.bytes -= size


class Saved:
    """What autograd keeps instead of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def tensors_in(function: Any) -> Iterator[Tensor]:
    """Yield the tensors in the closure of a function, and of functions in it."""
    for cell in function.__closure__ or ():
        if isinstance(cell.cell_contents, Tensor):
            yield cell.cell_contents
        elif callable(cell.cell_contents) and hasattr(cell.cell_contents, "__closure__"):
            yield from tensors_in(cell.cell_contents)


def storages(tensors: Any) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None}


def optimizer_tensors(engine: Engine) -> list[Tensor]:
    return [tensor for part in engine.zero_state().partitions() for tensor in (part.master, *part.states.values())]


def measure(config: Config) -> tuple[int, int, int, int]:
    """Return the bytes of this rank's parameters, gradients, optimizer tensors, and the peak of its saved activations."""
    engine = create_engine(config)
    train_step(engine, 0)
    weights = storages(getattr(p, "ds_tensor", p.data) for p in engine.parameters)
    masters = storages(optimizer_tensors(engine))
    live = LiveStorages(engine)
    gradients: dict[int, int] = {}
    add = engine.deferred_gradients.add

    def pack(tensor: Tensor) -> Saved:
        gradients.update(storages(p.grad for p in engine.parameters))
        saved = Saved(tensor)
        live.hold(saved, tensor)
        return saved

    def watched(job: Callable[[], None]) -> None:
        if not engine.deferred_gradients.is_deferring:
            add(job)
            return
        needed = [Saved(tensor) for tensor in tensors_in(job)]
        for saved in needed:
            live.hold(saved, saved.tensor)

        def run() -> None:
            job()
            needed.clear()

        add(run)

    engine.deferred_gradients.add = watched  # type: ignore[method-assign]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        train_step(engine, 1)
    gradients.update(storages(p.grad for p in engine.parameters))
    gradients.update(storages(p.grad for group in engine.optimizer.param_groups for p in group["params"]))
    result = sum(weights.values()), sum(gradients.values()), sum(masters.values()), live.peak
    engine.close()
    return result


def predicted(config: Config) -> list[tuple[int, int, int, int]]:
    """Return the same of each pipeline rank, without the gradients that the loss holds outside of autograd."""
    strategy = Strategy.of(config, WORLD, compiled=False)
    stages = StageModel(config).stages(strategy)
    held = [Held(stage.saved - sum(cost.held for cost in stage.costs), stage.deferred) for stage in stages]
    peaks = peaks_in_flight(strategy.schedule, strategy.virtual_stages, strategy.pipeline, strategy.micro_batches, held)
    memories = memory_by_rank(config, strategy, stages, peaks)
    assert [memory.weights for memory in memories] == [memory.weights for memory in predict_memory(config, strategy)]
    return [(memory.weights, memory.gradients, memory.optimizer, memory.activations) for memory in memories]


@pytest.mark.parametrize("zero", [0, 2, 3, *more(1)])
def test_ranks_hold_the_predicted_bytes_under_zero(zero: int, ranks: Pool) -> None:
    check(config_of(zero=zero, pipeline=1 if zero == 3 else 2), ranks)


@pytest.mark.parametrize(
    "schedule",
    chosen([name for name in SCHEDULES if name != "1f1b"], "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"),
)
def test_ranks_hold_the_predicted_bytes_in_every_schedule(schedule: str, ranks: Pool) -> None:
    check(config_of(schedule), ranks)


def check(config: Config, ranks: Pool) -> None:
    expected = predicted(config)
    per_stage = WORLD // config.parallel.pipeline
    for rank, measured in enumerate(ranks.run(WORLD, measure, config)):
        assert measured == pytest.approx(expected[rank // per_stage], rel=0.02), (rank, config.parallel.schedule)
