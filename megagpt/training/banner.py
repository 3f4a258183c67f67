"""What a run is about to do, in a few lines for its start."""

from collections.abc import Mapping

import torch

from megagpt import __version__
from megagpt.config.schema import Config
from megagpt.data.blend import Dataset
from megagpt.data.examples import PackedExamples
from megagpt.data.pairs import Pairs
from megagpt.data.tokenizer import load_tokenizer
from megagpt.distributed.object_collectives import all_gather_object
from megagpt.distributed.rank_zero import rank_zero_print, rank_zero_warn
from megagpt.engine.deepspeed_internals import local_size
from megagpt.engine.freezing import has_frozen_weights, trained_names
from megagpt.engine.optimizer import is_unrelated_apex, optimizer_name
from megagpt.parallel.topology import Layout
from megagpt.planner.coverage import is_supported
from megagpt.planner.memory import estimate, peak_memory
from megagpt.planner.parameters import parameter_count
from megagpt.planner.strategy import Strategy
from megagpt.training.evaluation import evaluated_samples
from megagpt.training.run_warnings import config_warnings, data_warnings, epochs_of_each, tokenizer_warnings
from megagpt.training.throughput import peak_of_run
from megagpt.training.trainer import Trainer

MAX_CORPORA = 8
"""Corpora of a blend that are listed."""


def announce_run(trainer: Trainer) -> None:
    """Print the banner and the warnings of a run that is about to train, on rank 0. Collective."""
    if trainer.is_complete:
        return
    sizes = all_gather_object(sum(local_size(parameter) for parameter in trainer.engine.parameters))
    config, datasets = trainer.config, trainer.datasets
    warnings = config_warnings(config, trainer.total_steps, bool(datasets.valid or config.evaluation.sample_prompts))
    warnings += data_warnings(config, datasets.train, last_sample(trainer))
    if trainer.device.type == "cuda" and is_unrelated_apex():
        warnings.append("the installed package apex is not NVIDIA's, whose FusedAdam would be used; torch's optimizer is used")
    if config.data.tokenizer is not None:
        warnings += tokenizer_warnings(config, datasets, load_tokenizer(config.data.tokenizer))
    for line in banner(trainer, max(sizes)):
        rank_zero_print(line)
    for warning in warnings:
        rank_zero_warn(warning)


def banner(trainer: Trainer, rank_parameters: int) -> list[str]:
    """Return the lines of the banner. `rank_parameters`: parameters of the rank that has most."""
    config, datasets, layout = trainer.config, trainer.datasets, trainer.topology.layout
    return [
        f"megagpt {__version__}, PyTorch {torch.__version__}",
        f"model      {parameter_count(config):,} parameters{_trained(config)}",
        f"layout     {layout_line(config, layout)}",
        f"memory     {memory_line(config, layout, rank_parameters, trainer.engine.compiles)}",
        f"device     {device_line(trainer.device, config)}",
        f"kernels    {kernels_line(trainer.engine.compiles, optimizer_name(trainer.engine.optimizer))}",
        *length_lines(config, trainer.step, trainer.total_steps),
        *data_lines(config, datasets.train, last_sample(trainer)),
        *evaluation_lines(config, datasets.valid, datasets.test),
        *output_lines(config),
    ]


def _trained(config: Config) -> str:
    if not has_frozen_weights(config):
        return ""
    return f", of which {parameter_count(config, trained_names(config)):,} are trained"


def last_sample(trainer: Trainer) -> int:
    """Return the number of samples that the run has read at its end; a ramp of the batch size reads less."""
    steps_left = trainer.total_steps - trainer.step
    return trainer.consumed_samples + steps_left * trainer.config.training.global_batch_size


def layout_line(config: Config, layout: Layout) -> str:
    """Return the layout as a product of its axes, with ZeRO and the pipeline schedule."""
    return (
        f"data {layout.data} x pipeline {layout.pipeline} x context {layout.context} x tensor {layout.tensor} = "
        f"{layout.world_size} ranks, ZeRO-{config.zero.stage}, {config.parallel.schedule}"
    )


def memory_line(config: Config, layout: Layout, rank_parameters: int, compiled: bool) -> str:
    """Return the memory of the largest rank, which has `rank_parameters`, as the planner predicts it.

    `compiled`: whether the functions between matrix products are compiled.
    """
    strategy = Strategy.of(config, layout.world_size, compiled)
    if not is_supported(config):
        total = estimate(config, strategy, rank_parameters, 0, 0, 0).total
        return (
            f"the largest rank has {rank_parameters:,} parameters: at most {_size(total)} of weights, gradients and optimizer "
            "states; activations come on top"
        )
    peak = peak_memory(config, strategy)
    return (
        f"predicted peak {_size(peak.total)} on the largest rank: weights {_size(peak.weights)}, gradients "
        f"{_size(peak.gradients)}, optimizer {_size(peak.optimizer)}, activations {_size(peak.activations)}, "
        f"buffers {_size(peak.communication + peak.working)}"
    )


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.3g} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.3g} MiB"


def device_line(device: torch.device, config: Config) -> str:
    """Return the name of the device, the precision, and the peak that the MFU is a share of, if there is one."""
    precision, peak = config.training.precision, peak_of_run(config, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if peak is not None:
        return f"{name}, {precision}, peak {peak:g} TFLOP/s"
    if device.type != "cuda":
        return f"{name}, {precision}"
    return f"{name}, {precision}, no MFU, because its peak is not known; logging.peak_tflops sets it"


def kernels_line(compiles: bool, optimizer: str) -> str:
    """Return what is compiled, and which optimizer runs."""
    return f"{'compiled' if compiles else 'eager'} between matrix products, {optimizer}"


def length_lines(config: Config, step: int, total_steps: int) -> list[str]:
    """Return batch size and length of the run."""
    training = config.training
    model = config.model
    tokens = training.global_batch_size * model.sample_tokens
    start = f"{step:,} to " if step else ""
    ramp = ", after a ramp" if training.batch_ramp.start is not None else ""
    source = f"({model.source_length:,} + {model.n_positions:,})" if model.encoder_layers else f"{model.n_positions:,}"
    sequences = f"{training.global_batch_size:,} sequences x {source}"
    return [
        f"batch      {sequences} = {tokens:,} tokens per step{ramp}; micro-batch {training.micro_batch_size}",
        f"steps      {start}{total_steps:,}, at most {total_steps * tokens:,} tokens",
    ]


def data_lines(config: Config, dataset: Dataset, n_samples: int) -> list[str]:
    """Return the size of the training data, and how often each corpus is read up to sample `n_samples`."""
    length = config.model.sample_tokens
    corpora = epochs_of_each(dataset, n_samples)
    lines = [
        f"data       {packed.corpus.prefix}: {packed.samples_per_epoch:,} samples, "
        f"{packed.samples_per_epoch * length:,} tokens, read {epochs:.2f} times"
        for packed, epochs in corpora[:MAX_CORPORA]
    ]
    lines += [
        f"           {packed.summary}" for packed, _ in corpora[:MAX_CORPORA] if isinstance(packed, PackedExamples | Pairs)
    ]
    return lines + ([f"           and {len(corpora) - MAX_CORPORA} more corpora"] if len(corpora) > MAX_CORPORA else [])


def evaluation_lines(config: Config, valid: Mapping[str, Dataset], test: Dataset | None) -> list[str]:
    """Return when and on how many samples the run is evaluated."""
    evaluation, length, parts = config.evaluation, config.model.sample_tokens, []
    when = f"every {evaluation.interval} steps and " if evaluation.interval is not None else ""
    for name, dataset in valid.items():
        which = f" {name.removeprefix('eval_')}" if name != "eval" else ""
        parts.append(f"{when}at the end on {_used(dataset, evaluation.samples, length)} of the validation data{which}")
    if test is not None:
        parts.append(f"at the end on {_used(test, evaluation.test_samples, length)} of the test data")
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


def _used(dataset: Dataset, asked: int | None, length: int) -> str:
    used, available = evaluated_samples(dataset, asked), dataset.unrepeated_samples
    share = f"all {available:,}" if used == available else f"{used:,} of {available:,}"
    return f"{share} samples ({used * length:,} tokens)"
