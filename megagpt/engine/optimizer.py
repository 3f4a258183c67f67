"""The optimizer and its two groups of parameters: matrices with weight decay, biases and norms without.

Frozen parameters are in no group.
"""

import importlib
from collections.abc import Iterable

import torch
from torch import nn

from megagpt.config.schema import OptimizerConfig


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer that ZeRO shards: on CUDA apex's FusedAdam if NVIDIA apex is installed, else torch's fused one."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.type == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    decoupled = config.type == "adamw"
    fused_adam = _apex_fused_adam() if trained[0].is_cuda else None
    if fused_adam is not None:
        return fused_adam(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, adam_w_mode=decoupled)
    optimizer = torch.optim.AdamW if decoupled else torch.optim.Adam
    return optimizer(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def _apex_fused_adam() -> type | None:
    """Return NVIDIA apex's FusedAdam, or None. The `apex` package on PyPI is another project without this module."""
    try:
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError):
        return None
