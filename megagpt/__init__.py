"""A GPT pretrainer: tensor x pipeline x data parallel over DeepSpeed, in which the layout is a deployment detail."""

__version__ = "0.1.0"
