"""Configs of runs that save and resume, and the state of ranks joined to full tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_get_full_fp32_param, safe_get_full_optimizer_state

from megagpt.config import Config
from megagpt.engine.engine import Engine
from megagpt.parallel.parameter import Shard, shard_of
from megagpt.training.loggers.base import Logger
from support.runs import Tree, tiny_config

MOMENTS = ("exp_avg", "exp_avg_sq")
FullState = dict[tuple[str, str], np.ndarray]
"""(state name, parameter name) -> full tensor."""


class LayoutCase(NamedTuple):
    """A parallel layout to test."""

    world_size: int
    parallel: Tree
    zero_stage: int


class LocalTensor(NamedTuple):
    """One parameter on a rank."""

    name: str
    shard: Shard
    values: dict[str, np.ndarray]
    """State name -> this rank's shard."""


def run_config(folder: Path, data: str, parallel: Tree, zero_stage: int, steps: int, **sections: Tree) -> Config:
    """Return the config of a run of 20 steps that stops after `steps`; dropout makes random state matter."""
    tree: Tree = {
        "model": {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
        "data": {"train": data},
        "training": {"steps": steps, "micro_batch_size": 2, "global_batch_size": 8},
        "lr_schedule": {"warmup_steps": 3, "decay_steps": 20},
        "checkpoint": {"dir": str(folder / "checkpoints")},
        "logging": {"interval": 1, "metrics_file": str(folder / "metrics.jsonl")},
    }
    return tiny_config(parallel=parallel, zero={"stage": zero_stage}, **{**tree, **sections})


def layout_config(layout: LayoutCase, data: str, steps: int, decay_steps: int, **sections: Tree) -> Config:
    """Return the config of a run with dropout under `layout`, with the same global batches under each."""
    parallel = layout.parallel
    dp_size = layout.world_size // (parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("context", 1))
    tree: Tree = {
        "model": {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
        "data": {"train": data},
        "training": {"steps": steps, "micro_batch_size": 4 // dp_size, "global_batch_size": 8},
        "lr_schedule": {"warmup_steps": 3, "decay_steps": decay_steps},
        "logging": {"interval": 1},
    }
    for section, keys in sections.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return tiny_config(parallel=parallel, zero={"stage": layout.zero_stage}, **tree)


def local_state(engine: Engine, with_moments: bool = True) -> list[LocalTensor]:
    """Return this rank's parameters, read by DeepSpeed's own functions; moments exist after the first step or a load."""
    zero = engine.deepspeed.optimizer
    moments = MOMENTS if with_moments else ()
    if with_moments and engine.config.zero.stage < 3:
        # DeepSpeed does this in the first of its own steps at an accumulation boundary.
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)
    tensors = []
    for parameter in engine.parameters:
        values = {"master": safe_get_full_fp32_param(parameter)}
        values |= {state: safe_get_full_optimizer_state(parameter, state) for state in moments}
        shard = shard_of(parameter)
        if not shard.second_copy:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            arrays = {state: tensor.float().reshape(shape).numpy().copy() for state, tensor in values.items()}
            tensors.append(LocalTensor(shard.name, shard, arrays))
    return tensors


def full_state(ranks: list[list[LocalTensor]]) -> FullState:
    """Join the tensors of all ranks to full tensors; replicas must agree."""
    tensors: FullState = {}
    for rank in ranks:
        for name, shard, values in rank:
            for state, array in values.items():
                target = tensors.setdefault((state, name), np.full(shard.shape, np.nan, np.float32))
                dim = shard.dim or 0
                length = min(array.shape[dim], shard.shape[dim] - shard.start)
                if length <= 0:
                    continue
                region = tuple(
                    slice(shard.start, shard.start + length) if d == dim else slice(None) for d in range(target.ndim)
                )
                local = array.take(range(length), axis=dim)
                assert np.isnan(target[region]).all() or np.array_equal(target[region], local), f"replicas of {name} differ"
                target[region] = local
    assert not any(np.isnan(tensor).any() for tensor in tensors.values())
    return tensors


class AfterStep:
    """A logger that passes records on to another one and then calls `action`, after every training step."""

    def __init__(self, logger: Logger, action: Callable[[], Any]) -> None:
        self._logger = logger
        self._action = action

    def step(self, record: Tree) -> None:
        self._logger.step(record)
        if "loss" in record:
            self._action()

    def rewind(self, step: int) -> None:
        self._logger.rewind(step)

    def close(self) -> None:
        self._logger.close()
