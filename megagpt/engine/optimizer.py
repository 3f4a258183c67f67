"""The optimizer and its groups of parameters: matrices with weight decay, biases and norms without, and learning rates.

Frozen parameters are in no group.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from megagpt.config.schema import Config, OptimizerConfig
from megagpt.engine.muon import Muon
from megagpt.parallel.parameter import Shard, shard_of

MUON_MOMENTUM = 0.95


class Group(NamedTuple):
    """What the parameters of one group share."""

    matrix: bool
    """Whether they have more than one dim; others have no weight decay."""
    lr_scale: float
    """Factor of the learning rate."""
    orthogonal: bool = False
    """Whether Muon updates them."""


def group_of_shard(shard: Shard, config: Config) -> Group:
    """Return the group of a parameter: under muP the matrices of wider blocks have lower learning rates."""
    matrix = len(shard.shape) > 1
    in_block = matrix and "layers." in shard.name
    scale = 1 / config.model.width_growth if in_block else 1.0
    for pattern, factor in config.optimizer.learning_rate_scales.items():
        if fnmatchcase(shard.name, pattern):
            scale *= factor
    return Group(matrix, scale, config.optimizer.type == "muon" and in_block)


def groups_of_model(config: Config, model: nn.Module) -> list[Group]:
    """Return the groups of the full model, in the order that every rank uses; there is one of each number of dims.

    `model`: the meta model of the config.
    """
    groups = {group_of_shard(shard_of(parameter), config) for parameter in model.parameters()}
    for matrix in (True, False):
        if not any(group.matrix == matrix for group in groups):
            groups.add(Group(matrix, 1.0))
    return sorted(groups, reverse=True)


def set_group(parameter: nn.Parameter, group: Group) -> None:
    """Attach its group to a parameter."""
    cast(Any, parameter).optimizer_group = group


def group_of(parameter: nn.Parameter) -> Group:
    """Return the parameter's group; without one it has the learning rate of the config."""
    group: Group = getattr(parameter, "optimizer_group", Group(parameter.dim() > 1, 1.0))
    return group


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer that ZeRO shards: on CUDA apex's FusedAdam if NVIDIA apex is installed, else torch's fused one."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in trained if group_of(parameter) == group],
            "weight_decay": config.weight_decay if group.matrix else 0.0,
            "lr_scale": group.lr_scale,
            "decays": group.matrix,
            "orthogonal": group.orthogonal,
        }
        for group in sorted(set(map(group_of, trained)), reverse=True)
    ]
    if config.type == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    if config.type == "muon":
        return Muon(groups, config.learning_rate, config.betas, config.eps, config.momentum or MUON_MOMENTUM)
    decoupled = config.type == "adamw"
    fused_adam = _apex_fused_adam() if trained[0].is_cuda else None
    if fused_adam is not None:
        return fused_adam(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, adam_w_mode=decoupled)
    optimizer = torch.optim.AdamW if decoupled else torch.optim.Adam
    return optimizer(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """Set the learning rate of each group."""
    for group in groups:
        group["lr"] = learning_rate * group["lr_scale"]


def set_weight_decay(groups: Iterable[dict[str, Any]], weight_decay: float) -> None:
    """Set the weight decay of the groups of matrices; others have none."""
    for group in groups:
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """Return the optimizer with the library whose kernels run."""
    kind, library = type(optimizer).__name__, type(optimizer).__module__.split(".")[0]
    if library == "torch":
        return f"torch's {'fused ' if optimizer.defaults.get('fused') else ''}{kind}"
    return kind if library == "megagpt" else f"NVIDIA apex's {kind}"


def is_unrelated_apex() -> bool:
    """Whether a package `apex` is installed that is not NVIDIA's: the one on PyPI is another project."""
    return _find_spec("apex") is not None and _apex_fused_adam() is None


def _apex_fused_adam() -> type | None:
    """Return NVIDIA apex's FusedAdam, or None."""
    try:
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError):
        return None


def _find_spec(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # a module without a specification
        return sys.modules.get(name)
