"""Rules that join several keys, and the world sizes that a layout fits. Pure functions of a `Config`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megagpt.config.schema import Config
from megagpt.errors import ConfigError

OWNED_BY_MEGAGPT = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_clipping": "optimizer.clip_grad",
    "optimizer": "optimizer",
    "scheduler": "lr_schedule",
    "fp16.enabled": "training.precision",
    "bf16": "training.precision",
    "torch_autocast": "training.precision",
    "data_types": "training.precision",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer": "zero.offload_optimizer",
    "zero_optimization.offload_param": "zero.offload_param",
    "zero_allow_untested_optimizer": "optimizer.type",
    "zero_force_ds_cpu_optimizer": "optimizer.type",
    "activation_checkpointing": "training.recompute",
    "wandb": "logging.wandb",
    "steps_per_print": "logging.interval",
    "pipeline": "parallel.pipeline",
}
"""DeepSpeed's key -> the key of ours that decides it."""


@dataclass(frozen=True)
class Problem:
    """One rule broken: the keys that it joins, and the sentence for the user."""

    keys: tuple[str, ...]
    message: str


def broken_rules(config: Config) -> list[Problem]:
    """Every rule that `config` breaks, whatever the number of ranks."""
    sizes = (_shape, _tensor_parallel, _context, _pipeline, _zero, _batch, _ramp)
    rules = (*sizes, _noise_scale, _length, _checkpoint, _data, _lr_schedule, _optimizer, _deepspeed)
    return [problem for rule in rules for problem in rule(config)]


def _shape(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.n_embd % model.n_head:
        yield Problem(
            ("model.n_embd", "model.n_head"),
            f"model.n_head: {model.n_head} heads do not divide model.n_embd {model.n_embd}; "
            f"{_sizes(divisors(model.n_embd))} would",
        )


def _tensor_parallel(config: Config) -> Iterator[Problem]:
    tensor, model = config.parallel.tensor, config.model
    sharded = {"model.n_head": model.n_head, "model.ffn_hidden": model.ffn_width, "model.vocab_multiple": model.vocab_multiple}
    if config.parallel.sequence_parallel:
        sharded["model.n_positions"] = model.n_positions
    for key, size in sharded.items():
        if size % tensor:
            yield Problem(
                (key, "parallel.tensor", "parallel.sequence_parallel", "model.n_embd"),
                f"parallel.tensor: {tensor} does not divide {key} {size}; "
                f"tensor sizes that would: {_sizes(divisors(size))}; nearest {key}: {max(1, round(size / tensor)) * tensor}",
            )
    if config.parallel.sequence_parallel and tensor == 1:
        yield Problem(
            ("parallel.sequence_parallel", "parallel.tensor"),
            "parallel.sequence_parallel: splits the sequence over tensor ranks, but parallel.tensor is 1; "
            "set it to false or parallel.tensor to 2 or more",
        )


def _context(config: Config) -> Iterator[Problem]:
    parallel, model = config.parallel, config.model
    part = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    if model.n_head % (parallel.context * parallel.tensor):
        yield Problem(
            ("parallel.context", "parallel.tensor", "model.n_head"),
            f"parallel.context: {parallel.context} x parallel.tensor {parallel.tensor} does not divide model.n_head "
            f"{model.n_head}, over which attention is shared out; products that would: {_sizes(divisors(model.n_head))}",
        )
    if parallel.context > 1 and model.n_positions % part:
        yield Problem(
            ("parallel.context", "parallel.tensor", "parallel.sequence_parallel", "model.n_positions"),
            f"parallel.context: {part} parts (with sequence parallelism) do not divide model.n_positions {model.n_positions}; "
            f"nearest model.n_positions: {max(1, round(model.n_positions / part)) * part}",
        )


INTERLEAVED = ("interleaved_1f1b", "interleaved_zero_bubble")
V_SHAPED = ("zbv", "v_half", "v_min")


def chunks_per_rank(config: Config) -> int:
    """Pipeline stages that each rank has under the config's schedule."""
    return 2 if config.parallel.schedule in V_SHAPED else config.parallel.virtual_stages


def _pipeline(config: Config) -> Iterator[Problem]:
    parallel, layers = config.parallel, config.model.n_layer
    allowed = {**dict.fromkeys(V_SHAPED, (1, 2)), **dict.fromkeys(INTERLEAVED, range(2, layers + 1))}.get(
        parallel.schedule, (1,)
    )
    if parallel.virtual_stages not in allowed:
        hint = "2 or more" if parallel.schedule in INTERLEAVED else " or ".join(map(str, allowed))
        yield Problem(
            ("parallel.virtual_stages", "parallel.schedule"),
            f"parallel.virtual_stages: {parallel.virtual_stages} with parallel.schedule {parallel.schedule}; expected {hint}",
        )
    stages = parallel.pipeline * chunks_per_rank(config)
    if stages > layers:
        yield Problem(
            ("parallel.pipeline", "parallel.virtual_stages", "parallel.schedule", "model.n_layer"),
            f"parallel.pipeline: {stages} stages for model.n_layer {layers}; every stage needs a layer, so at most {layers}",
        )


def _zero(config: Config) -> Iterator[Problem]:
    zero = config.zero
    if zero.stage == 3 and config.parallel.pipeline > 1:
        yield Problem(
            ("zero.stage", "parallel.pipeline"),
            f"zero.stage: 3 with parallel.pipeline {config.parallel.pipeline} gives wrong gradients (weights that are "
            "gathered per layer cannot stay whole while micro-batches are in flight); use zero.stage 1 or 2, "
            "or parallel.pipeline 1",
        )
    elif zero.stage == 3 and config.parallel.schedule not in ("1f1b", "gpipe", "auto"):
        yield Problem(
            ("zero.stage", "parallel.schedule"),
            f"zero.stage: 3 with parallel.schedule {config.parallel.schedule}, which leaves weight gradients or whole chunks "
            'for later, while stage 3 frees the weights; use parallel.schedule "1f1b", or zero.stage 1 or 2',
        )
    if zero.stage == 0 and zero.offload_optimizer != "none":
        yield Problem(
            ("zero.stage", "zero.offload_optimizer"),
            'zero.offload_optimizer: needs zero.stage 1, 2 or 3, not 0; "none" fits stage 0',
        )
    if zero.stage != 3 and zero.offload_param != "none":
        yield Problem(
            ("zero.stage", "zero.offload_param"), f'zero.offload_param: needs zero.stage 3, not {zero.stage}; "none" fits it'
        )


def _batch(config: Config) -> Iterator[Problem]:
    training = config.training
    for key, size in {
        "training.micro_batch_size": training.micro_batch_size,
        "evaluation.micro_batch_size": config.evaluation.micro_batch_size or 1,
    }.items():
        if training.global_batch_size % size:
            yield Problem(
                (key, "training.global_batch_size"),
                f"{key}: {size} does not divide training.global_batch_size {training.global_batch_size}; "
                f"{_sizes(divisors(training.global_batch_size))} would",
            )


def _ramp(config: Config) -> Iterator[Problem]:
    training, ramp = config.training, config.training.batch_ramp
    micro, full, key = training.micro_batch_size, training.global_batch_size, "training.batch_ramp"
    if (ramp.start is None) != (ramp.samples == 0):
        missing, given = ("start", "samples") if ramp.start is None else ("samples", "start")
        yield Problem((f"{key}.start", f"{key}.samples"), f"{key}.{missing}: goes with {key}.{given}; give both or neither")
    if ramp.start is None:
        return
    if ramp.start >= full:
        yield Problem(
            (f"{key}.start", "training.global_batch_size"),
            f"{key}.start: {ramp.start} is not below training.global_batch_size {full}; without a ramp leave {key} out",
        )
    elif (full - ramp.start) % ramp.increment:
        yield Problem(
            (f"{key}.increment", f"{key}.start", "training.global_batch_size"),
            f"{key}.increment: steps of {ramp.increment} from {ramp.start} do not meet training.global_batch_size {full}; "
            f"{_sizes([size for size in divisors(full - ramp.start) if size % micro == 0])} would",
        )
    for name, size in (("start", ramp.start), ("increment", ramp.increment)):
        if size % micro:
            yield Problem(
                (f"{key}.{name}", "training.micro_batch_size"),
                f"{key}.{name}: {size} is not a multiple of training.micro_batch_size {micro}; "
                f"nearest: {max(1, round(size / micro)) * micro}",
            )


def _noise_scale(config: Config) -> Iterator[Problem]:
    if config.logging.noise_scale_interval is None:
        return
    training, key = config.training, "logging.noise_scale_interval"
    if config.zero.stage == 3:
        yield Problem(
            (key, "zero.stage"), f"{key}: gradients of single micro-batches are not kept whole under zero.stage 3; use 0 to 2"
        )
    smallest = training.batch_ramp.start or training.global_batch_size
    if smallest <= training.micro_batch_size:
        yield Problem(
            (key, "training.micro_batch_size", "training.global_batch_size", "training.batch_ramp.start"),
            f"{key}: compares micro-batches with the whole batch, but both have {smallest} sequences; "
            f"use a smaller training.micro_batch_size",
        )


def _length(config: Config) -> Iterator[Problem]:
    training = config.training
    given = [key for key in ("steps", "tokens", "epochs") if getattr(training, key) is not None]
    if len(given) != 1:
        yield Problem(
            ("training.steps", "training.tokens", "training.epochs"),
            f"training: give exactly one of steps, tokens and epochs, not {' and '.join(given) or 'none'}",
        )


def _checkpoint(config: Config) -> Iterator[Problem]:
    training, checkpoint, resilience = config.training, config.checkpoint, config.resilience
    if training.max_hours is not None and checkpoint.dir is None:
        yield Problem(
            ("training.max_hours", "checkpoint.dir"),
            "training.max_hours: saves when the time is over, but checkpoint.dir is not set; name a folder",
        )
    if checkpoint.keep_every is not None and not checkpoint.keep:
        yield Problem(
            ("checkpoint.keep_every", "checkpoint.keep"),
            "checkpoint.keep_every: goes with checkpoint.keep, which is 0 and keeps all; give checkpoint.keep as well",
        )
    for key in ("on_nonfinite", "on_overflow", "on_spike"):
        if getattr(resilience, key) == "rollback" and (checkpoint.dir is None or checkpoint.interval is None):
            yield Problem(
                (f"resilience.{key}", "checkpoint.dir", "checkpoint.interval"),
                f'resilience.{key}: "rollback" needs checkpoints to go back to; set checkpoint.dir and checkpoint.interval',
            )


def _data(config: Config) -> Iterator[Problem]:
    data = config.data
    separate = [key for key in ("train", "valid", "test") if getattr(data, key) is not None]
    if data.paths is not None and separate:
        yield Problem(
            ("data.paths", "data.train", "data.valid", "data.test"),
            f"data.paths: excludes data.{separate[0]}; give paths with split, or train, valid and test",
        )
    if (data.paths is None) != (data.split is None):
        yield Problem(
            ("data.paths", "data.split"), 'data.split: goes with data.paths, such as "969,30,1"; give both or neither'
        )
    if data.split is not None and not _is_split(data.split):
        yield Problem(
            ("data.split",),
            f'data.split: {data.split!r} is not three shares of train, valid and test; write for example "969,30,1"',
        )
    for key in ("train", "valid", "test", "paths"):
        source = getattr(data, key)
        if isinstance(source, dict) and (not source or min(source.values()) <= 0):
            yield Problem((f"data.{key}",), f"data.{key}: needs at least one prefix, each with a weight above 0")


def _lr_schedule(config: Config) -> Iterator[Problem]:
    schedule = config.lr_schedule
    if schedule.min_lr > config.optimizer.learning_rate:
        yield Problem(
            ("lr_schedule.min_lr", "optimizer.learning_rate"),
            f"lr_schedule.min_lr: {schedule.min_lr:g} is above optimizer.learning_rate {config.optimizer.learning_rate:g}",
        )
    if schedule.type in ("cosine", "linear") and (schedule.decay_steps or schedule.warmup_steps + 1) <= schedule.warmup_steps:
        yield Problem(
            ("lr_schedule.decay_steps", "lr_schedule.warmup_steps"),
            f"lr_schedule.decay_steps: {schedule.decay_steps} must be above lr_schedule.warmup_steps {schedule.warmup_steps}",
        )


def _optimizer(config: Config) -> Iterator[Problem]:
    for beta in config.optimizer.betas:
        if not 0 <= beta < 1:
            yield Problem(("optimizer.betas",), f"optimizer.betas: {beta:g} is not in [0, 1); try [0.9, 0.95]")


def _deepspeed(config: Config) -> Iterator[Problem]:
    for key in flat_keys(config.deepspeed):
        for owned, ours in OWNED_BY_MEGAGPT.items():
            if key == owned or key.startswith(owned + "."):
                yield Problem((f"deepspeed.{key}",), f"deepspeed.{key}: megagpt sets this key itself; use {ours}")
    for section in sorted({owned.partition(".")[0] for owned in OWNED_BY_MEGAGPT if "." in owned}):
        value = config.deepspeed.get(section, {})
        if not isinstance(value, dict):  # in DeepSpeed's short forms a key of ours would pass unseen
            yield Problem((f"deepspeed.{section}",), f"deepspeed.{section}: expected an object of settings, not {value!r}")


def flat_keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of the leaves of `tree`."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def data_parallel_size(config: Config, world_size: int) -> int:
    """Ranks in a world of `world_size` that hold the same parameters: data-parallel times context-parallel ones.

    Raises ConfigError, naming sizes that fit, where the world does not.
    """
    parallel = config.parallel
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    micro_batches = _micro_batches(config)
    if world_size % ranks == 0 and micro_batches % (world_size // ranks) == 0:
        return world_size // (parallel.tensor * parallel.pipeline)
    fitting = [ranks * size for size in divisors(micro_batches)]
    context = f" x context {parallel.context}" if parallel.context > 1 else ""
    raise ConfigError(
        f"parallel: a world of {world_size} ranks does not fit tensor {parallel.tensor} x pipeline "
        f"{parallel.pipeline}{context} x data, with {micro_batches} micro-batches (training.global_batch_size / "
        f"the micro-batch size{_in_ramp(config)}) to share; world sizes that fit: {_sizes(fitting)}"
    )


def _micro_batches(config: Config) -> int:
    """What data-parallel ranks share evenly: the micro-batches of a step, or the common divisor of a ramp's steps."""
    training, ramp = config.training, config.training.batch_ramp
    full = training.global_batch_size // math.lcm(training.micro_batch_size, config.evaluation.micro_batch_size or 1)
    if ramp.start is None:
        return full
    return math.gcd(full, ramp.start // training.micro_batch_size, ramp.increment // training.micro_batch_size)


def _in_ramp(config: Config) -> str:
    return ", and for every size of training.batch_ramp" if config.training.batch_ramp.start is not None else ""


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _sizes(sizes: list[int]) -> str:
    shown = sizes if len(sizes) <= 12 else [*sizes[:11], sizes[-1]]
    return ", ".join(map(str, shown))


def _is_split(text: str) -> bool:
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        return False
    return len(shares) == 3 and min(shares) >= 0 and shares[0] > 0
