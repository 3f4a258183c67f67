"""The update rule, over two groups of parameters: matrices, which decay, and biases and norms, which do not.

Frozen parameters are in neither.
"""

import importlib
from collections.abc import Iterable

import torch
from torch import nn

from megagpt.config.schema import OptimizerConfig


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that ZeRO will shard; apex's FusedAdam on CUDA where NVIDIA apex is installed, else torch's fused one."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.type == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    decoupled = config.type == "adamw"
    fused_adam = _apex_fused_adam() if parameters[0].is_cuda else None
    if fused_adam is not None:
        return fused_adam(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, adam_w_mode=decoupled)
    rule = torch.optim.AdamW if decoupled else torch.optim.Adam
    return rule(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def _apex_fused_adam() -> type | None:
    """NVIDIA apex's FusedAdam, if the user has it (the `apex` of PyPI is another project and has no such module)."""
    try:
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError):
        return None
