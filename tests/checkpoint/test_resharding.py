"""A checkpoint of any layout goes on under any other: every bit of weights and moments, and the losses of 10 more steps.

The state is read back by DeepSpeed's own functions, which know nothing of our checkpoints. Losses, fp32: 1e-6 relative to
the run that was never stopped, under the layout that saved; sums in another order differ by about 1e-7.
"""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_get_full_fp32_param, safe_get_full_optimizer_state
from support.pool import Pool
from support.runs import Losses, Tree, corpus, open_trainer, tiny_config

from megagpt.config import Config
from megagpt.parallel.shard import is_second_copy, shard_of
from megagpt.parallel.traffic import counting
from megagpt.training import snapshot
from megagpt.training.trainer import Batch, Trainer

SAVED, MORE = 5, 10
LAYOUTS: dict[str, tuple[int, Tree, int]] = {
    "alone": (1, {}, 1),
    "2 x 2 x 2, ZeRO-1": (8, {"tensor": 2, "pipeline": 2}, 1),
    "zbv x data 2, ZeRO-2": (4, {"pipeline": 2, "schedule": "zbv"}, 2),
    "data 4, ZeRO-3": (4, {}, 3),
    "tensor 4": (4, {"tensor": 4}, 1),
    "interleaved x tensor 2 x data 2, sequence parallel, ZeRO-0": (
        8,
        {"tensor": 2, "pipeline": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2, "sequence_parallel": True},
        0,
    ),
    "context 2 x data 2, ZeRO-2": (4, {"context": 2}, 2),
}
KINDS = ("master", "exp_avg", "exp_avg_sq")


def config_of(layout: tuple[int, Tree, int], data: str, steps: int, **sections: Tree) -> Config:
    world, parallel, stage = layout
    readers = world // (parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("context", 1))
    tree: Tree = {
        "data": {"train": data},
        "training": {"steps": steps, "micro_batch_size": 4 // readers, "global_batch_size": 8},
        "lr_schedule": {"warmup_steps": 3, "decay_steps": SAVED + MORE},
        "logging": {"interval": 1},
    }
    for section, keys in sections.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return tiny_config(parallel=parallel, zero={"stage": stage}, **tree)


def held(trainer: Trainer) -> list[tuple[str, Any, Tree]]:
    """(name, shard, {kind: values}) of each parameter on this rank, as DeepSpeed tells."""
    zero, kinds = trainer.engine.deepspeed.optimizer, KINDS[1:] if trainer.step else ()
    if (
        trainer.step and trainer.config.zero.stage < 3
    ):  # DeepSpeed does this at the first of its own steps that it calls a boundary
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)
    found = []
    for parameter in trainer.engine.parameters:
        values = {"master": safe_get_full_fp32_param(parameter)}
        values |= {kind: safe_get_full_optimizer_state(parameter, kind) for kind in kinds}
        if not is_second_copy(parameter):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            arrays = {kind: tensor.float().reshape(shape).numpy().copy() for kind, tensor in values.items()}
            found.append((shard_of(parameter).name, shard_of(parameter), arrays))
    return found


def whole(results: list[Any]) -> dict[tuple[str, str], np.ndarray]:
    """Logical tensors by (kind, name), put together from what all ranks hold; replicas must agree."""
    tensors: dict[tuple[str, str], np.ndarray] = {}
    for rank in results:
        for name, shard, values in rank:
            for kind, array in values.items():
                target = tensors.setdefault((kind, name), np.full(shard.shape, np.nan, np.float32))
                along = shard.dim or 0
                length = min(array.shape[along], shard.shape[along] - shard.start)
                if length <= 0:
                    continue
                place = tuple(
                    slice(shard.start, shard.start + length) if d == along else slice(None) for d in range(target.ndim)
                )
                part = array.take(range(length), axis=along)
                assert np.isnan(target[place]).all() or np.array_equal(target[place], part), f"replicas of {name} differ"
                target[place] = part
    assert not any(np.isnan(tensor).any() for tensor in tensors.values())
    return tensors


def save_and_go_on(config: Config) -> tuple[Any, list[float]]:
    """A run that is never stopped: what this rank holds when it saves, and all losses."""
    trainer = open_trainer(config)
    trainer.logger = losses = Losses()
    advance, found = trainer.advance, []

    def step(batch: Batch) -> Any:
        verdict = advance(batch)
        if trainer.step == SAVED:
            found.extend(held(trainer))
        return verdict

    with mock.patch.object(trainer, "advance", step):
        trainer.train()
    trainer.close()
    return found, losses.values


def load_each(config: Config, folders: list[Path]) -> list[Any]:
    """What this rank holds after loading each checkpoint, one after the other."""
    trainer = open_trainer(config)
    results = []
    for folder in folders:
        trainer._load(folder)
        assert trainer.step == SAVED
        results.append(held(trainer))
    trainer.close()
    return results


def go_on_from_each(configs: list[Config]) -> list[list[float]]:
    """The losses of the steps after each config's checkpoint."""
    results = []
    for config in configs:
        trainer = open_trainer(config)
        trainer.logger = losses = Losses()
        trainer.train()
        trainer.close()
        results.append(losses.values)
    return results


Source = tuple[Path, dict[tuple[str, str], np.ndarray], list[float]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def sources(ranks: Pool, data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """For each layout: its checkpoint after 5 steps, the state that it was made of, and the losses of the 10 steps after."""
    found = {}
    for name, layout in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("source")
        config = config_of(layout, data, SAVED + MORE, checkpoint={"dir": str(folder), "interval": SAVED})
        results = ranks.run(layout[0], save_and_go_on, config)
        found[name] = (folder / f"step_{SAVED:08d}", whole([held for held, _ in results]), results[0][1][SAVED:])
    return found


@pytest.mark.parametrize("target", LAYOUTS)
def test_every_bit_that_any_layout_saved_is_loaded_under_this_one(
    target: str, ranks: Pool, data: str, sources: dict[str, Source]
) -> None:
    layout = LAYOUTS[target]
    by_rank = ranks.run(layout[0], load_each, config_of(layout, data, SAVED + MORE), [f for f, _, _ in sources.values()])
    for number, (source, (_, expected, _)) in enumerate(sources.items()):
        loaded = whole([results[number] for results in by_rank])
        assert loaded.keys() == expected.keys()
        for key, values in expected.items():
            assert np.array_equal(loaded[key], values), (source, key)
        assert np.abs(expected["exp_avg_sq", "layers.1.mlp.up.weight"]).max() > 0


@pytest.mark.parametrize("target", LAYOUTS)
def test_what_another_layout_saved_goes_on_under_this_one(
    target: str, ranks: Pool, data: str, sources: dict[str, Source]
) -> None:
    """From the next layout of the list, in a circle; from all with MEGAGPT_ALL_PAIRS=1."""
    layout, at = LAYOUTS[target], list(LAYOUTS).index(target)
    others = [*LAYOUTS, *LAYOUTS][at + 1 : at + 2] if not os.environ.get("MEGAGPT_ALL_PAIRS") else list(LAYOUTS)
    configs = [config_of(layout, data, SAVED + MORE, checkpoint={"resume": str(sources[name][0])}) for name in others]
    for source, losses in zip(others, ranks.run(layout[0], go_on_from_each, configs)[0], strict=True):
        assert len(losses) == MORE
        assert losses == pytest.approx(sources[source][2], rel=1e-6), source


def bytes_said_and_read(config: Config) -> tuple[int, int, int]:
    """Of saving and loading on this rank: bytes of the largest exchange of tensors, bytes read, of the whole checkpoint."""
    trainer = open_trainer(config)
    with counting(trainer.topology) as traffic:
        trainer._save()
        trainer._saves.finish(required=True)
        restored = snapshot.restore(trainer.engine, Path(config.checkpoint.dir or "") / "step_00000000")
    trainer.close()
    largest = max((traffic.bytes[kind] // traffic.calls[kind] for kind in traffic.calls), default=0)
    return largest, restored.bytes_read[trainer.topology.rank], restored.total_bytes


@pytest.mark.parametrize("name", ["2 x 2 x 2, ZeRO-1", "data 4, ZeRO-3", "tensor 4"])
def test_no_rank_gathers_the_model_and_each_reads_what_it_needs(name: str, ranks: Pool, data: str, tmp_path: Path) -> None:
    """A wider model, so that a tensor is larger than what the ranks tell each other of names and sizes."""
    layout = LAYOUTS[name]
    world, parallel, stage = layout
    config = config_of(layout, data, 1, checkpoint={"dir": str(tmp_path)}, model={"n_embd": 256, "n_layer": 4})
    one_matrix = 4 * 256 * 1024
    results = ranks.run(world, bytes_said_and_read, config)
    for largest, read, total in results:
        assert largest < one_matrix / 4
        # Its part of the weights and moments, and below stage 3 of the weights again for the forwards: at most
        # (3 / data + 1) of 3 parts of its stage and tensor shard, and the embeddings and vectors that are not cut so evenly.
        data_ranks = world // (parallel.get("tensor", 1) * parallel.get("pipeline", 1))
        share = (3 / data_ranks + (stage != 3)) / 3 / (world // data_ranks)
        assert read < 1.25 * share * total, (read, share * total)
    assert sum(read for _, read, _ in results) >= 0.95 * results[0][2]  # together they read all
