"""What a run is about to do, in a few lines for its start."""

import torch

from megagpt import __version__
from megagpt.config.schema import Config
from megagpt.data.blend import Dataset
from megagpt.data.tokenizer import load_tokenizer
from megagpt.distributed.rank_zero import rank_zero_print, rank_zero_warn
from megagpt.engine.deepspeed_internals import local_size
from megagpt.parallel.topology import Layout
from megagpt.planner.memory import state_memory
from megagpt.planner.parameters import parameter_count
from megagpt.training.evaluation import evaluated_samples
from megagpt.training.run_warnings import config_warnings, data_warnings, epochs_of_each, tokenizer_warnings
from megagpt.training.throughput import peak_tflops
from megagpt.training.trainer import Trainer

MAX_CORPORA = 8
"""Corpora of a blend that are listed."""


def announce_run(trainer: Trainer) -> None:
    """Print the banner and the warnings of a run that is about to train, on rank 0."""
    if trainer.topology.rank != 0 or trainer.is_complete:
        return
    config, datasets = trainer.config, trainer.datasets
    steps_left = trainer.total_steps - trainer.step
    end = trainer.consumed_samples + steps_left * config.training.global_batch_size  # a ramp reads less
    warnings = config_warnings(config, trainer.total_steps, datasets.valid is not None)
    warnings += data_warnings(config, datasets.train, end)
    if config.data.tokenizer is not None:
        warnings += tokenizer_warnings(config, datasets, load_tokenizer(config.data.tokenizer))
    rank_parameters = sum(local_size(parameter) for parameter in trainer.engine.parameters)
    lines = [
        f"megagpt {__version__}, PyTorch {torch.__version__}",
        f"model      {parameter_count(config):,} parameters",
        f"layout     {layout_line(config, trainer.topology.layout)}",
        f"memory     {memory_line(config, trainer.topology.layout, rank_parameters)}",
        f"device     {device_line(trainer.device, config.training.precision)}",
        *length_lines(config, trainer.step, trainer.total_steps),
        *data_lines(config, datasets.train, end),
        *evaluation_lines(config, datasets.valid, datasets.test),
        *output_lines(config),
    ]
    for line in lines:
        rank_zero_print(line)
    for warning in warnings:
        rank_zero_warn(warning)


def layout_line(config: Config, layout: Layout) -> str:
    """Return the layout as a product of its axes, with ZeRO and the pipeline schedule."""
    return (
        f"data {layout.data} x pipeline {layout.pipeline} x context {layout.context} x tensor {layout.tensor} = "
        f"{layout.world_size} ranks, ZeRO-{config.zero.stage}, {config.parallel.schedule}"
    )


def memory_line(config: Config, layout: Layout, rank_parameters: int) -> str:
    """Return the memory of rank 0, which has `rank_parameters`, without activations."""
    memory = state_memory(config, layout, rank_parameters)
    return (
        f"rank 0 has {rank_parameters:,} parameters: {memory.total / 2**30:.3g} GiB of weights, gradients and optimizer "
        "states; activations come on top"
    )


def device_line(device: torch.device, precision: str) -> str:
    """Return the name of the device, the precision, and the peak that the MFU is a share of, if there is one."""
    if device.type != "cuda":
        return f"CPU, {precision}"
    peak = peak_tflops(device, precision)
    text = "no MFU, because its peak is not known" if peak is None else f"peak {peak:g} TFLOP/s"
    return f"{torch.cuda.get_device_name(device)}, {precision}, {text}"


def length_lines(config: Config, step: int, total_steps: int) -> list[str]:
    """Return batch size and length of the run."""
    training = config.training
    tokens = training.global_batch_size * config.model.n_positions
    start = f"{step:,} to " if step else ""
    ramp = ", after a ramp" if training.batch_ramp.start is not None else ""
    sequences = f"{training.global_batch_size:,} sequences x {config.model.n_positions:,}"
    return [
        f"batch      {sequences} = {tokens:,} tokens per step{ramp}; micro-batch {training.micro_batch_size}",
        f"steps      {start}{total_steps:,}, at most {total_steps * tokens:,} tokens",
    ]


def data_lines(config: Config, dataset: Dataset, n_samples: int) -> list[str]:
    """Return the size of the training data, and how often each corpus is read up to sample `n_samples`."""
    length = config.model.n_positions
    corpora = epochs_of_each(dataset, n_samples)
    lines = [
        f"data       {packed.corpus.prefix}: {packed.samples_per_epoch:,} samples, "
        f"{packed.samples_per_epoch * length:,} tokens, read {epochs:.2f} times"
        for packed, epochs in corpora[:MAX_CORPORA]
    ]
    return lines + ([f"           and {len(corpora) - MAX_CORPORA} more corpora"] if len(corpora) > MAX_CORPORA else [])


def evaluation_lines(config: Config, valid: Dataset | None, test: Dataset | None) -> list[str]:
    """Return when and on how many samples the run is evaluated."""
    evaluation, parts = config.evaluation, []
    if valid is not None:
        when = f"every {evaluation.interval} steps and " if evaluation.interval is not None else ""
        parts.append(f"{when}at the end on {_of_all(valid, evaluation.samples)} validation samples")
    if test is not None:
        parts.append(f"at the end on {_of_all(test, evaluation.test_samples)} test samples")
    return [f"evaluation {'; '.join(parts)}"] if parts else []


def output_lines(config: Config) -> list[str]:
    """Return where the run writes."""
    checkpoint, parts = config.checkpoint, []
    if checkpoint.dir is not None:
        when = f"every {checkpoint.interval} steps and " if checkpoint.interval is not None else ""
        parts.append(f"checkpoints to {checkpoint.dir} {when}at the end")
    if config.logging.metrics_file is not None:
        parts.append(f"metrics to {config.logging.metrics_file}")
    if config.logging.tensorboard.dir is not None:
        parts.append(f"TensorBoard events to {config.logging.tensorboard.dir}")
    if config.logging.wandb.project is not None:
        parts.append(f"W&B project {config.logging.wandb.project}")
    return [f"writes     {'; '.join(parts)}"] if parts else []


def _of_all(dataset: Dataset, asked: int | None) -> str:
    used, available = evaluated_samples(dataset, asked), dataset.unrepeated_samples
    return f"all {available:,}" if used == available else f"{used:,} of {available:,}"
