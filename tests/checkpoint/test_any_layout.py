"""A checkpoint of any layout goes on under any other: every bit of weights and moments, and the losses of 10 more steps.

The state is read back by DeepSpeed's own functions, which know nothing of our checkpoints. Losses, fp32: 1e-6 relative to
the run that was never stopped, under the layout that saved; sums in another order differ by about 1e-7.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_get_full_fp32_param, safe_get_full_optimizer_state
from support.pool import Pool
from support.runs import Tree, corpus, tiny_config

from megagpt.config import Config
from megagpt.data.blend import build_datasets
from megagpt.parallel.shard import is_second_copy, shard_of
from megagpt.parallel.topology import Topology
from megagpt.parallel.traffic import counting
from megagpt.training import snapshot
from megagpt.training.trainer import Trainer

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


class Losses:
    """A logger that keeps the losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def step(self, record: Tree) -> None:
        self.values += [record["loss"]] if "loss" in record else []

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


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


def open_trainer(config: Config) -> Trainer:
    parallel = config.parallel
    topology = Topology.create(parallel.tensor, parallel.pipeline, context=parallel.context)
    return Trainer(config, topology, build_datasets(config.data, config.model.n_positions), torch.device("cpu"))


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


def save_and_tell(config: Config) -> Any:
    """Train to the end, save, and what this rank holds."""
    trainer = open_trainer(config)
    trainer.train()
    found = held(trainer)
    trainer.close()
    return found


def straight(config: Config) -> list[float]:
    """The losses of a run that is never stopped."""
    trainer = open_trainer(config)
    trainer.logger = losses = Losses()
    trainer.train()
    trainer.close()
    return losses.values


def resume_each(configs: list[Config]) -> list[tuple[Any, list[float]]]:
    """What this rank holds after loading each config's checkpoint, and the losses of the steps after it."""
    results = []
    for config in configs:
        trainer = open_trainer(config)
        found = held(trainer)
        trainer.logger = losses = Losses()
        assert trainer.step == SAVED
        trainer.train()
        trainer.close()
        results.append((found, losses.values))
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
        results = ranks.run(layout[0], save_and_tell, config_of(layout, data, SAVED, checkpoint={"dir": str(folder)}))
        losses = ranks.run(layout[0], straight, config_of(layout, data, SAVED + MORE))[0]
        found[name] = (folder, whole(results), losses[SAVED:])
    return found


@pytest.mark.parametrize("target", LAYOUTS)
def test_what_any_layout_saved_goes_on_under_this_one(target: str, ranks: Pool, data: str, sources: dict[str, Source]) -> None:
    layout = LAYOUTS[target]
    configs = [config_of(layout, data, SAVED + MORE, checkpoint={"resume": str(folder)}) for folder, _, _ in sources.values()]
    by_rank = ranks.run(layout[0], resume_each, configs)
    for number, (source, (_, expected, losses)) in enumerate(sources.items()):
        loaded = whole([results[number][0] for results in by_rank])
        assert loaded.keys() == expected.keys()
        for key, values in expected.items():
            assert np.array_equal(loaded[key], values), (source, key)
        assert np.abs(expected["exp_avg_sq", "layers.1.mlp.up.weight"]).max() > 0
        assert by_rank[0][number][1] == pytest.approx(losses, rel=1e-6), source


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
