"""A checkpoint of any layout resumes under any other: every bit of weights and moments, and the losses of 3 more steps.

The state is read back by DeepSpeed's own functions, which are independent of megagpt's checkpoints. Losses in fp32 agree to
1e-6 (relative) with the run that was never stopped, under the layout that saved; sums in another order differ by about 1e-7.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.checkpoints import AfterStep, FullState, LayoutCase, LocalTensor, full_state, layout_config, local_state
from support.exhaustive import EXHAUSTIVE
from support.pool import Pool
from support.runs import Losses, Tree, corpus, open_trainer

from megagpt.checkpoint.files import write_safetensors
from megagpt.checkpoint.save import AsyncSaver
from megagpt.config import Config
from megagpt.planner.collective_counter import CollectiveCounter
from megagpt.training.checkpointing import load_checkpoint
from megagpt.training.train_state import RunProgress, entries, restore, run_state

SAVED_STEP, MORE_STEPS = 2, 3
LAYOUTS = {
    "alone": LayoutCase(1, {}, 1),
    "2 x 2 x 2, ZeRO-1": LayoutCase(8, {"tensor": 2, "pipeline": 2}, 1),
    "zbv x data 2, ZeRO-2": LayoutCase(4, {"pipeline": 2, "schedule": "zbv"}, 2),
    "data 4, ZeRO-3": LayoutCase(4, {}, 3),
    "tensor 4": LayoutCase(4, {"tensor": 4}, 1),
    "interleaved x tensor 2 x data 2, sequence parallel, ZeRO-0": LayoutCase(
        8,
        {"tensor": 2, "pipeline": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2, "sequence_parallel": True},
        0,
    ),
    "context 2 x data 2, ZeRO-2": LayoutCase(4, {"context": 2}, 2),
}


class Source(NamedTuple):
    """A checkpoint, and the run that saved it and continued."""

    folder: Path
    state: FullState
    """State at the save, read from the engine."""
    losses: list[float]
    """Losses of the steps after the save."""


def config_of(layout: LayoutCase, data: str, **sections: Tree) -> Config:
    return layout_config(layout, data, SAVED_STEP + MORE_STEPS, SAVED_STEP + MORE_STEPS, **sections)


def save_and_continue(config: Config) -> tuple[list[LocalTensor], list[float]]:
    """Train without a stop; return this rank's state at the save, and all losses."""
    trainer = open_trainer(config)
    losses = Losses()
    state: list[LocalTensor] = []

    def record_state() -> None:
        if trainer.step == SAVED_STEP:
            state.extend(local_state(trainer.engine))

    trainer.logger = AfterStep(losses, record_state)
    trainer.train()
    trainer.close()
    return state, losses.values


def load_each(config: Config, folders: list[Path]) -> list[list[LocalTensor]]:
    """Load one checkpoint after the other; return this rank's state after each."""
    trainer = open_trainer(config)
    results = []
    for folder in folders:
        assert load_checkpoint(trainer.engine, folder).step == SAVED_STEP
        results.append(local_state(trainer.engine))
    trainer.close()
    return results


def resume_each(configs: list[Config]) -> list[list[float]]:
    """Return the losses of the steps after each config's checkpoint."""
    results = []
    for config in configs:
        trainer = open_trainer(config)
        trainer.logger = losses = Losses()
        trainer.train()
        trainer.close()
        results.append(losses.values)
    return results


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def sources(ranks: Pool, data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """A checkpoint after 2 steps under each layout."""
    sources = {}
    for name, layout in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("source")
        config = config_of(layout, data, checkpoint={"dir": str(folder), "interval": SAVED_STEP})
        results = ranks.run(layout.world_size, save_and_continue, config)
        state = full_state([local for local, _ in results])
        sources[name] = Source(folder / f"step_{SAVED_STEP:08d}", state, results[0][1][SAVED_STEP:])
    return sources


@pytest.mark.parametrize("target", LAYOUTS)
def test_every_bit_saved_under_any_layout_is_loaded_under_this_one(
    target: str, ranks: Pool, data: str, sources: dict[str, Source]
) -> None:
    """From two other layouts, in a cycle; from all layouts in the exhaustive suite."""
    layout, index = LAYOUTS[target], list(LAYOUTS).index(target)
    names = list(LAYOUTS) if EXHAUSTIVE else [*LAYOUTS, *LAYOUTS][index + 1 : index + 6 : 3]
    by_rank = ranks.run(layout.world_size, load_each, config_of(layout, data), [sources[name].folder for name in names])
    for number, name in enumerate(names):
        source = sources[name]
        loaded = full_state([results[number] for results in by_rank])
        assert loaded.keys() == source.state.keys()
        for key, values in source.state.items():
            assert np.array_equal(loaded[key], values), (name, key)
        assert np.abs(source.state["exp_avg_sq", "layers.1.mlp.up.weight"]).max() > 0


@pytest.mark.parametrize("target", LAYOUTS)
def test_a_run_saved_under_another_layout_resumes_under_this_one_with_equal_losses(
    target: str, ranks: Pool, data: str, sources: dict[str, Source]
) -> None:
    """Resume from the next layout of the list (after the last, the first); from all layouts in the exhaustive suite."""
    layout, index = LAYOUTS[target], list(LAYOUTS).index(target)
    others = [*LAYOUTS, *LAYOUTS][index + 1 : index + 2] if not EXHAUSTIVE else list(LAYOUTS)
    configs = [config_of(layout, data, checkpoint={"resume": str(sources[name].folder)}) for name in others]
    for name, losses in zip(others, ranks.run(layout.world_size, resume_each, configs)[0], strict=True):
        assert len(losses) == MORE_STEPS
        assert losses == pytest.approx(sources[name].losses, rel=1e-6), name


def bytes_sent_and_read(config: Config, folder: Path) -> tuple[int, int, int]:
    """Save and load; return the bytes of the largest collective, the bytes that this rank read, and the checkpoint's."""
    trainer = open_trainer(config)
    engine = trainer.engine
    counters = [CollectiveCounter(trainer.topology), CollectiveCounter(trainer.topology)]

    def write_then_count(*args: Any) -> Any:
        written = write_safetensors(*args)
        counters[1].__enter__()  # for the rest of the writer thread, which ends with the saver
        return written

    with counters[0]:
        saver = AsyncSaver(folder, 0, None, None, write_file=write_then_count)
        saver.start(0, entries(engine), run_state(engine, RunProgress(consumed_samples=0)), config.model_dump(mode="json"))
        result = saver.finish()
        assert result is not None and result.problem is None
        restored = restore(engine, folder / "step_00000000")
        saver.close()
    trainer.close()
    assert all(counter.calls for counter in counters)
    largest = max(counter.bytes[key] // counter.calls[key] for counter in counters for key in counter.calls)
    return largest, restored.bytes_read[trainer.topology.rank], restored.total_bytes


@pytest.mark.parametrize("name", ["2 x 2 x 2, ZeRO-1", "data 4, ZeRO-3", "tensor 4"])
def test_no_rank_gathers_the_model_and_each_reads_only_what_it_needs(name: str, ranks: Pool, data: str, tmp_path: Path) -> None:
    """Use a wider model, so that a tensor is larger than the names and sizes that the ranks exchange."""
    layout = LAYOUTS[name]
    config = config_of(layout, data, model={"n_embd": 256, "n_layer": 4})
    one_matrix = 4 * 256 * 1024
    results = ranks.run(layout.world_size, bytes_sent_and_read, config, tmp_path)
    for largest, read, total in results:
        assert largest < one_matrix / 4
        # A rank reads its share of weights and moments, and below stage 3 the weights of its shard again for the forwards:
        # at most (3 / dp_size + 1) of 3 shares of its stage and tensor shard, plus embeddings and vectors, which are not
        # split as evenly.
        dp_size = layout.world_size // (layout.parallel.get("tensor", 1) * layout.parallel.get("pipeline", 1))
        share = (3 / dp_size + (layout.zero_stage != 3)) / 3 / (layout.world_size // dp_size)
        assert read < 1.25 * share * total, (read, share * total)
    assert sum(read for _, read, _ in results) >= 0.95 * results[0][2]  # together they read everything
