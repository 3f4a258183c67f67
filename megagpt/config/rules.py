"""Rules that join several keys, and the world sizes that a layout fits. Pure functions of a `Config`."""

import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megagpt.config.schema import Config
from megagpt.errors import ConfigError
from megagpt.schedules.registry import SCHEDULES, chunks_per_rank

OWNED_BY_MEGAGPT = {
    "train_batch_size": "use training.global_batch_size",
    "train_micro_batch_size_per_gpu": "use training.micro_batch_size",
    "gradient_accumulation_steps": "use training.global_batch_size",
    "gradient_clipping": "use optimizer.clip_grad",
    "optimizer": "use optimizer",
    "scheduler": "use lr_schedule",
    "fp16.enabled": "use training.precision",
    "bf16": "use training.precision",
    "torch_autocast": "use training.precision",
    "data_types": "use training.precision",
    "zero_optimization.stage": "use zero.stage",
    "zero_optimization.offload_optimizer": "use zero.offload_optimizer",
    "zero_optimization.offload_param": "use zero.offload_param",
    "zero_optimization.overlap_comm": "remove it: megagpt schedules the gradient reduction itself",
    "zero_allow_untested_optimizer": "use optimizer.type",
    "zero_force_ds_cpu_optimizer": "use optimizer.type",
    "activation_checkpointing": "use training.recompute",
    "wandb": "use logging.wandb",
    "gradient_allreduce_op": "remove it: the loss is a mean over the tokens of the global batch",
    "steps_per_print": "use logging.interval",
    "pipeline": "use parallel.pipeline",
}
"""DeepSpeed keys that the user must not set -> what to do instead."""

OBJECT, FLAG, NUMBER = "an object of settings", "true or false", "a number"
DTYPES_OF_COMMUNICATION = ("fp16", "bf16", "fp32")
DEEPSPEED_KEYS: dict[str, str | tuple[str, ...]] = {
    "aio": OBJECT,
    "checkpoint": OBJECT,
    "comet": OBJECT,
    "comms_logger": OBJECT,
    "communication_data_type": DTYPES_OF_COMMUNICATION,
    "compile": OBJECT,
    "csv_monitor": OBJECT,
    "disable_allgather": FLAG,
    "disable_python_gc": FLAG,
    "dump_state": FLAG,
    "flops_profiler": OBJECT,
    "fp16": OBJECT,
    "gradient_predivide_factor": NUMBER,
    "log_level": ("debug", "info", "warning", "error", "critical"),
    "memory_breakdown": FLAG,
    "nebula": OBJECT,
    "prescale_gradients": FLAG,
    "seq_parallel_communication_data_type": DTYPES_OF_COMMUNICATION,
    "tensorboard": OBJECT,
    "timers": OBJECT,
    "wall_clock_breakdown": FLAG,
    "zero_optimization": OBJECT,
}
"""Top-level keys of DeepSpeed 0.19 that a user may set, with what they must be: a kind, or one of several texts.

DeepSpeed ignores unknown keys silently, and fails without the key's name on values of another kind."""


@dataclass(frozen=True)
class Problem:
    """A broken rule: the keys that it joins, and the message for the user."""

    keys: tuple[str, ...]
    message: str


def broken_rules(config: Config) -> list[Problem]:
    """Return all rules that `config` breaks, for any number of ranks."""
    layout = (_shape, _encoder, _tensor_parallel, _fp8, _context, _pipeline, _zero)
    batches = (_batch, _ramp, _noise_scale, _length)
    tasks = (_data, _samples, _fill_in_the_middle, _encoder_tasks, _classification, _preference)
    other = (_checkpoint, _lr_schedule, _optimizer, _deepspeed)
    return [problem for rule in (*layout, *batches, *tasks, *other) for problem in rule(config)]


def _shape(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.head_dim is None and model.n_embd % model.n_head:
        yield Problem(
            ("model.n_embd", "model.n_head"),
            f"model.n_head: {model.n_head} heads do not divide model.n_embd {model.n_embd}; "
            f"valid: {_sizes(divisors(model.n_embd))}, or set model.head_dim",
        )
    if model.n_head % model.kv_heads:
        yield Problem(
            ("model.n_kv_head", "model.n_head"),
            f"model.n_kv_head: {model.kv_heads} key and value heads do not divide model.n_head {model.n_head}; "
            f"valid: {_sizes(divisors(model.n_head))}",
        )
    if model.norm_placement != "before" and model.parallel_branches != "no":
        yield Problem(
            ("model.parallel_branches", "model.norm_placement"),
            f'model.parallel_branches: "{model.parallel_branches}" needs model.norm_placement "before", '
            f'not "{model.norm_placement}"',
        )
    if model.qk_norm == "width" and model.norm != "rmsnorm":
        yield Problem(("model.qk_norm", "model.norm"), f'model.qk_norm: "width" needs model.norm "rmsnorm", not "{model.norm}"')
    if model.full_attention_every is not None and model.attention_window is None:
        yield Problem(
            ("model.full_attention_every", "model.attention_window"),
            "model.full_attention_every: has no effect without model.attention_window; set it, or leave this key out",
        )
    if model.position_embedding == "relative" and (
        model.relative_buckets % 2 or model.relative_max_distance <= model.relative_buckets // 2
    ):
        yield Problem(
            ("model.relative_buckets", "model.relative_max_distance"),
            f"model.relative_buckets: {model.relative_buckets} must be even, and half of it below model.relative_max_distance "
            f"{model.relative_max_distance}; try 32 and 128",
        )
    if model.mup_base_width is not None and model.init_scheme == "small_wang":
        yield Problem(
            ("model.mup_base_width", "model.init_scheme"),
            'model.mup_base_width: needs model.init_scheme "scaled" or "plain": "small_wang" depends on the width itself',
        )
    if model.mup_base_width is not None and config.optimizer.type not in ("adamw", "adam"):
        yield Problem(
            ("model.mup_base_width", "optimizer.type"),
            'model.mup_base_width: its learning rates are those of Adam; set optimizer.type "adamw" or "adam"',
        )
    if model.head_size:  # more heads than n_embd have a rule of their own
        yield from _rotary(config)


def _rotary(config: Config) -> Iterator[Problem]:
    model, rotary = config.model, config.model.rotary
    if model.position_embedding != "rotary":
        if rotary != type(rotary)():
            yield Problem(
                ("model.rotary", "model.position_embedding"),
                f'model.rotary: has no effect with model.position_embedding "{model.position_embedding}"; '
                'set that to "rotary", or leave this section out',
            )
        return
    if int(model.head_size * rotary.fraction) < 2:
        yield Problem(
            ("model.rotary.fraction", "model.n_embd"),
            f"model.rotary.fraction: {rotary.fraction:g} of a head of {model.head_size} is less than one pair of dims; "
            f"set at least {2 / model.head_size:g}",
        )
    if rotary.scaling in ("yarn", "llama3") and rotary.original_positions is None:
        yield Problem(
            ("model.rotary.original_positions", "model.rotary.scaling"),
            f'model.rotary.original_positions: scaling "{rotary.scaling}" needs it; set the sequence length of the pretraining',
        )
    if rotary.scaling == "none" and rotary.factor != 1:
        yield Problem(
            ("model.rotary.factor", "model.rotary.scaling"),
            f"model.rotary.factor: {rotary.factor:g} has no effect without model.rotary.scaling",
        )
    if rotary.high_freq_factor <= rotary.low_freq_factor:
        yield Problem(
            ("model.rotary.high_freq_factor", "model.rotary.low_freq_factor"),
            f"model.rotary.high_freq_factor: {rotary.high_freq_factor:g} must be above low_freq_factor "
            f"{rotary.low_freq_factor:g}",
        )


WITH_ENCODER = {
    "norm_placement": ("before",),
    "parallel_branches": ("no",),
    "qk_norm": ("none",),
    "position_embedding": ("relative", "learned", "rotary", "none"),
    "attention_window": (None,),
    "attention_softcap": (None,),
    "attention_sinks": (False,),
}
"""Keys of the model -> the values that work with an encoder."""


def _encoder(config: Config) -> Iterator[Problem]:
    model = config.model
    if not model.encoder_layers:
        if model.encoder_positions is not None:
            yield Problem(
                ("model.encoder_positions", "model.encoder_layers"),
                "model.encoder_positions: has no effect without an encoder; set model.encoder_layers, or leave this key out",
            )
        return
    for key, values in WITH_ENCODER.items():
        value = getattr(model, key)
        if value not in values:
            yield Problem(
                (f"model.{key}", "model.encoder_layers"),
                f"model.{key}: {json.dumps(value)} does not work with model.encoder_layers {model.encoder_layers}; "
                f"expected {' or '.join(map(json.dumps, values))}",
            )
    buckets = model.relative_buckets
    if model.position_embedding == "relative" and (buckets % 4 or model.relative_max_distance <= buckets // 2):
        yield Problem(
            ("model.relative_buckets", "model.encoder_layers"),
            f"model.relative_buckets: {buckets} with an encoder, which has half of them for each direction; expected a "
            f"multiple of 4, for example {max(4, buckets // 4 * 4)}",
        )


def _tensor_parallel(config: Config) -> Iterator[Problem]:
    tensor, model = config.parallel.tensor, config.model
    sharded = {
        "model.n_head": model.n_head,
        "model.ffn_hidden": model.ffn_hidden_size,
        "model.vocab_multiple": model.vocab_multiple,
    }
    if config.parallel.sequence_parallel:
        sharded["model.n_positions"] = model.n_positions
        if model.encoder_layers:
            sharded["model.encoder_positions"] = model.source_length
    for key, size in sharded.items():
        if size % tensor:
            yield Problem(
                (key, "parallel.tensor", "parallel.sequence_parallel", "model.n_embd"),
                f"parallel.tensor: {tensor} does not divide {key} {size}; "
                f"valid tensor sizes: {_sizes(divisors(size))}; nearest {key}: {_nearest_multiple(size, tensor)}",
            )
    if config.parallel.sequence_parallel and tensor == 1:
        yield Problem(
            ("parallel.sequence_parallel", "parallel.tensor"),
            "parallel.sequence_parallel: splits the sequence over the tensor ranks, but parallel.tensor is 1; "
            "set it to false, or set parallel.tensor to 2 or more",
        )


FP8_MULTIPLE = 16
"""CUDA's 8-bit products need matrices whose sizes are multiples of this."""


def _fp8(config: Config) -> Iterator[Problem]:
    model, tensor = config.model, config.parallel.tensor
    if config.training.precision != "fp8":
        return
    sizes = {
        "model.n_embd": (model.n_embd, 1),
        "model.n_head x head size": (model.n_head * model.head_size, tensor),
        "model.n_kv_head x head size": (model.kv_heads * model.head_size, tensor if model.kv_heads % tensor == 0 else 1),
        "model.ffn_hidden": (model.ffn_hidden_size, tensor),
    }
    for name, (size, ranks) in sizes.items():
        if size % (ranks * FP8_MULTIPLE):
            yield Problem(
                ("training.precision", "model.n_embd", "model.ffn_hidden", "parallel.tensor"),
                f'training.precision: "fp8" needs multiples of {FP8_MULTIPLE} on each tensor rank, and {name} is {size} on '
                f"{ranks} rank{'s' if ranks > 1 else ''}; nearest: {_nearest_multiple(size, ranks * FP8_MULTIPLE)}",
            )


def _context(config: Config) -> Iterator[Problem]:
    parallel, model = config.parallel, config.model
    if parallel.context == 1:
        return  # what is left depends on parallel.tensor, which has its own rule
    shards = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    if model.n_head % (parallel.context * parallel.tensor):
        yield Problem(
            ("parallel.context", "parallel.tensor", "model.n_head"),
            f"parallel.context: {parallel.context} x parallel.tensor {parallel.tensor} does not divide model.n_head "
            f"{model.n_head}, and each rank needs the same number of heads; valid products: {_sizes(divisors(model.n_head))}",
        )
    lengths = {"n_positions": model.n_positions}
    if model.encoder_layers:
        lengths["encoder_positions"] = model.source_length
    for key, length in lengths.items():
        if length % shards:
            yield Problem(
                ("parallel.context", "parallel.tensor", "parallel.sequence_parallel", f"model.{key}"),
                f"parallel.context: {shards} shards (with sequence parallelism) do not divide model.{key} "
                f"{length}; nearest model.{key}: {_nearest_multiple(length, shards)}",
            )


def _pipeline(config: Config) -> Iterator[Problem]:
    parallel, layers = config.parallel, config.model.n_blocks
    key = "model.encoder_layers + n_layer" if config.model.encoder_layers else "model.n_layer"
    chunks = 1
    if parallel.schedule == "auto":
        valid = parallel.virtual_stages == 1
        expected = "1"
    else:
        spec = SCHEDULES[parallel.schedule]
        valid = spec.accepts(parallel.virtual_stages)
        expected = spec.valid_virtual_stages
        if valid:
            chunks = chunks_per_rank(parallel.schedule, parallel.virtual_stages)
    if not valid:
        yield Problem(
            ("parallel.virtual_stages", "parallel.schedule"),
            f"parallel.virtual_stages: {parallel.virtual_stages} with parallel.schedule {parallel.schedule}; "
            f"expected {expected}",
        )
    stages = parallel.pipeline * chunks
    if stages > layers:
        product = f" ({parallel.pipeline} ranks x {chunks} chunks)" if chunks > 1 else ""
        yield Problem(
            ("parallel.pipeline", "parallel.virtual_stages", "parallel.schedule", "model.n_layer"),
            f"parallel.pipeline: {stages} stages{product} for {key} {layers}; each stage needs a layer, "
            f"so there can be at most {layers}",
        )


def _zero(config: Config) -> Iterator[Problem]:
    zero = config.zero
    if zero.stage == 3 and config.parallel.pipeline > 1:
        yield Problem(
            ("zero.stage", "parallel.pipeline"),
            f"zero.stage: 3 with parallel.pipeline {config.parallel.pipeline} gives wrong gradients (stage 3 frees a layer's "
            "weights after use, while other micro-batches in flight still need them); use zero.stage 1 or 2, "
            "or parallel.pipeline 1",
        )
    elif zero.stage == 3 and config.parallel.schedule not in ("1f1b", "gpipe", "auto"):
        yield Problem(
            ("zero.stage", "parallel.schedule"),
            f"zero.stage: 3 with parallel.schedule {config.parallel.schedule}, which delays weight gradients or has several "
            'chunks per rank, while stage 3 frees the weights; use parallel.schedule "1f1b", or zero.stage 1 or 2',
        )
    if zero.stage == 3 and config.training.compile is True:
        yield Problem(
            ("training.compile", "zero.stage"),
            "training.compile: true needs zero.stage 0, 1 or 2; stage 3 has a layer's weights only inside that layer; "
            'use "auto" or false',
        )
    if zero.stage == 0 and zero.offload_optimizer != "none":
        yield Problem(
            ("zero.stage", "zero.offload_optimizer"),
            'zero.offload_optimizer: needs zero.stage 1, 2 or 3, not 0; use "none" with stage 0',
        )
    if zero.stage != 3 and zero.offload_param != "none":
        yield Problem(
            ("zero.stage", "zero.offload_param"),
            f'zero.offload_param: needs zero.stage 3, not {zero.stage}; use "none" with stage {zero.stage}',
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
                f"valid: {_sizes(divisors(training.global_batch_size))}",
            )


def _ramp(config: Config) -> Iterator[Problem]:
    training, ramp, key = config.training, config.training.batch_ramp, "training.batch_ramp"
    micro_batch_size, full_size = training.micro_batch_size, training.global_batch_size
    if (ramp.start is None) != (ramp.samples == 0):
        missing, given = ("start", "samples") if ramp.start is None else ("samples", "start")
        yield Problem((f"{key}.start", f"{key}.samples"), f"{key}.{missing}: goes with {key}.{given}; set both or neither")
    if ramp.start is None:
        return
    if ramp.start >= full_size:
        yield Problem(
            (f"{key}.start", "training.global_batch_size"),
            f"{key}.start: {ramp.start} is not below training.global_batch_size {full_size}; for no ramp remove {key}",
        )
    elif (full_size - ramp.start) % ramp.increment:
        valid = [size for size in divisors(full_size - ramp.start) if size % micro_batch_size == 0]
        yield Problem(
            (f"{key}.increment", f"{key}.start", "training.global_batch_size"),
            f"{key}.increment: steps of {ramp.increment} from {ramp.start} do not meet training.global_batch_size {full_size}; "
            f"{_sizes(valid)} would",
        )
    for name, size in (("start", ramp.start), ("increment", ramp.increment)):
        if size % micro_batch_size:
            yield Problem(
                (f"{key}.{name}", "training.micro_batch_size"),
                f"{key}.{name}: {size} is not a multiple of training.micro_batch_size {micro_batch_size}; "
                f"nearest: {_nearest_multiple(size, micro_batch_size)}",
            )


def _noise_scale(config: Config) -> Iterator[Problem]:
    if config.logging.noise_scale_interval is None:
        return
    training, key = config.training, "logging.noise_scale_interval"
    if config.zero.stage == 3:
        yield Problem(
            (key, "zero.stage"),
            f"{key}: gradients of single micro-batches are not available under zero.stage 3; use zero.stage 0, 1 or 2",
        )
    smallest = training.batch_ramp.start or training.global_batch_size
    if smallest <= training.micro_batch_size:
        yield Problem(
            (key, "training.micro_batch_size", "training.global_batch_size", "training.batch_ramp.start"),
            f"{key}: compares micro-batches with the global batch, but both have {smallest} sequences; "
            "use a smaller training.micro_batch_size",
        )


def _length(config: Config) -> Iterator[Problem]:
    training = config.training
    given = [key for key in ("steps", "tokens", "epochs") if getattr(training, key) is not None]
    if len(given) != 1:
        yield Problem(
            ("training.steps", "training.tokens", "training.epochs"),
            f"training: set exactly one of steps, tokens and epochs, not {' and '.join(given) or 'none'}",
        )


def _checkpoint(config: Config) -> Iterator[Problem]:
    training, checkpoint, resilience = config.training, config.checkpoint, config.resilience
    if training.max_hours is not None and checkpoint.dir is None:
        yield Problem(
            ("training.max_hours", "checkpoint.dir"),
            "training.max_hours: saves when the time is over, but checkpoint.dir is not set; set it to a folder",
        )
    if checkpoint.initialize_from is not None and checkpoint.resume not in ("auto", "never"):
        yield Problem(
            ("checkpoint.initialize_from", "checkpoint.resume"),
            "checkpoint.initialize_from: starts from weights alone, but checkpoint.resume continues another checkpoint; "
            'leave one out, or set checkpoint.resume to "auto"',
        )
    if checkpoint.keep_every is not None and not checkpoint.keep:
        yield Problem(
            ("checkpoint.keep_every", "checkpoint.keep"),
            "checkpoint.keep_every: has no effect while checkpoint.keep is 0, which keeps all; set checkpoint.keep as well",
        )
    for key in ("on_nonfinite", "on_overflow", "on_spike"):
        if getattr(resilience, key) == "rollback" and (checkpoint.dir is None or checkpoint.interval is None):
            yield Problem(
                (f"resilience.{key}", "checkpoint.dir", "checkpoint.interval"),
                f'resilience.{key}: "rollback" needs checkpoints to return to; set checkpoint.dir and checkpoint.interval',
            )


def _data(config: Config) -> Iterator[Problem]:
    data = config.data
    separate = [key for key in ("train", "valid", "test") if getattr(data, key) is not None]
    if data.paths is not None and separate:
        yield Problem(
            ("data.paths", "data.train", "data.valid", "data.test"),
            f"data.paths: excludes data.{separate[0]}; set paths and split, or train, valid and test",
        )
    if (data.paths is None) != (data.split is None):
        missing, given = ("paths", "split") if data.paths is None else ("split", "paths")
        example = "" if data.paths is None else ', for example "969,30,1"'
        yield Problem(
            ("data.paths", "data.split"),
            f"data.{missing}: required together with data.{given}{example}; set both or neither",
        )
    if data.split is not None and not _is_split(data.split):
        yield Problem(
            ("data.split",),
            f"data.split: {data.split!r} is not three shares of train, valid and test; "
            'expected three numbers, for example "969,30,1"',
        )
    for key, source in data.sources.items():
        if isinstance(source, dict) and (not source or min(source.values()) <= 0):
            yield Problem((f"data.{key}",), f"data.{key}: needs at least one prefix, each with a weight above 0")


def _samples(config: Config) -> Iterator[Problem]:
    evaluation, key = config.evaluation, "evaluation.sample_prompts"
    if not evaluation.sample_prompts:
        return
    if config.data.tokenizer is None:
        yield Problem((key, "data.tokenizer"), f"{key}: needs data.tokenizer, to read prompts and to write texts; set it")
    if config.zero.stage == 3:
        yield Problem(
            (key, "zero.stage"), f"{key}: the output layer's weights are not in one place under zero.stage 3; use 0, 1 or 2"
        )
    if config.data.task == "classification":
        yield Problem((key, "data.task"), f'{key}: a model of data.task "classification" writes no text; leave it out')
    if evaluation.sample_tokens >= config.model.n_positions:
        yield Problem(
            ("evaluation.sample_tokens", "model.n_positions"),
            f"evaluation.sample_tokens: {evaluation.sample_tokens} leaves no room for a prompt in model.n_positions "
            f"{config.model.n_positions}; expected at most {config.model.n_positions - 1}",
        )


def _fill_in_the_middle(config: Config) -> Iterator[Problem]:
    data, key = config.data, "data.fill_in_the_middle.rate"
    if data.fill_in_the_middle.rate == 0:
        return
    if data.tokenizer is None:
        yield Problem((key, "data.tokenizer"), f"{key}: needs data.tokenizer, which has the special tokens; set it")
    if data.task != "text":
        yield Problem((key, "data.task"), f'{key}: has no meaning for data.task "{data.task}"; leave it out')
    if len(set(data.fill_in_the_middle.tokens)) < 3:
        yield Problem(("data.fill_in_the_middle.tokens",), "data.fill_in_the_middle.tokens: expected three different tokens")


def _encoder_tasks(config: Config) -> Iterator[Problem]:
    """Yield what does not fit together in the task of a model with an encoder."""
    data, keys = config.data, ("data.task", "model.encoder_layers")
    if data.needs_encoder and not config.model.encoder_layers:
        yield Problem(keys, f'data.task: "{data.task}" needs a model with an encoder; set model.encoder_layers')
    if config.model.encoder_layers and data.sources and not data.needs_encoder:
        tasks = '"span_corruption", "prefix_lm" or "pairs"'
        yield Problem(keys, f'data.task: "{data.task}" has no source for the encoder (model.encoder_layers); expected {tasks}')
    if not data.needs_encoder:
        return
    if data.task != "pairs" and data.sources and data.tokenizer is None:
        yield Problem(("data.tokenizer",), f'data.tokenizer: is needed by data.task "{data.task}"; set it')
    for key in ("reset_positions", "reset_attention", "mask_document_ends"):
        if getattr(data, key):
            yield Problem((f"data.{key}",), f'data.{key}: has no meaning for data.task "{data.task}"; leave it out')
    if config.model.decoder_start >= (config.model.vocab_size or 2**31):
        yield Problem(
            ("model.decoder_start", "model.vocab_size"),
            f"model.decoder_start: {config.model.decoder_start} is outside of the vocabulary; expected below "
            f"{config.model.vocab_size}",
        )


def _classification(config: Config) -> Iterator[Problem]:
    task = 'data.task "classification"'
    if (config.data.task == "classification") != bool(config.data.classes):
        yield Problem(("data.classes", "data.task"), f"data.classes: goes with {task}; set both or neither")
    if config.data.task != "classification":
        return
    for axis in ("pipeline", "context"):
        if getattr(config.parallel, axis) > 1:
            yield Problem((f"parallel.{axis}",), f"parallel.{axis}: does not work with {task}; expected 1")
    if config.zero.stage == 3:
        yield Problem(("zero.stage",), f"zero.stage: 3 does not work with {task}; expected 0, 1 or 2")


def _preference(config: Config) -> Iterator[Problem]:
    """Yield what preference tuning does not work with."""
    if config.data.task != "preference":
        return
    task = 'data.task "preference"'
    if config.checkpoint.initialize_from is None:
        yield Problem(("checkpoint.initialize_from",), f"checkpoint.initialize_from: required by {task}: the reference model")
    if config.parallel.context > 1:
        yield Problem(
            ("parallel.context",), f"parallel.context: {config.parallel.context} does not work with {task}; expected 1"
        )
    if config.zero.stage == 3:
        yield Problem(("zero.stage",), f"zero.stage: 3 does not work with {task}; expected 0, 1 or 2")
    for key in ("label_smoothing", "z_loss"):
        if getattr(config.training, key):
            yield Problem((f"training.{key}",), f"training.{key}: has no meaning for {task}; leave it out")
    if config.logging.noise_scale_interval is not None:
        yield Problem(
            ("logging.noise_scale_interval",), f"logging.noise_scale_interval: does not work with {task}; leave it out"
        )


def _lr_schedule(config: Config) -> Iterator[Problem]:
    schedule = config.lr_schedule
    if schedule.min_lr > config.optimizer.learning_rate:
        yield Problem(
            ("lr_schedule.min_lr", "optimizer.learning_rate"),
            f"lr_schedule.min_lr: {schedule.min_lr:g} is above optimizer.learning_rate {config.optimizer.learning_rate:g}",
        )
    decay_steps = schedule.decay_steps
    if schedule.type in ("cosine", "linear") and decay_steps is not None and decay_steps <= schedule.warmup_steps:
        yield Problem(
            ("lr_schedule.decay_steps", "lr_schedule.warmup_steps"),
            f"lr_schedule.decay_steps: {decay_steps} must be above lr_schedule.warmup_steps {schedule.warmup_steps}",
        )


def _optimizer(config: Config) -> Iterator[Problem]:
    if config.optimizer.type == "muon" and (config.zero.stage == 3 or config.zero.offload_optimizer != "none"):
        yield Problem(
            ("optimizer.type", "zero.stage", "zero.offload_optimizer"),
            'optimizer.type: "muon" needs zero.stage 0, 1 or 2 without zero.offload_optimizer, because it joins full matrices',
        )
    for beta in config.optimizer.betas:
        if not 0 <= beta < 1:
            yield Problem(("optimizer.betas",), f"optimizer.betas: {beta:g} is not in [0, 1); try [0.9, 0.95]")


def _deepspeed(config: Config) -> Iterator[Problem]:
    owned_sections = {owned.partition(".")[0] for owned in OWNED_BY_MEGAGPT}
    for key in list(config.deepspeed)[:100]:
        if key not in DEEPSPEED_KEYS and key not in owned_sections:
            (nearest,) = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1, cutoff=0.0) or ["zero_optimization"]
            yield Problem((f"deepspeed.{key}",), f"deepspeed.{key}: DeepSpeed has no such key; the nearest is {nearest}")
    for key in flat_keys(config.deepspeed):
        for owned, instead in OWNED_BY_MEGAGPT.items():
            if key == owned or key.startswith(owned + "."):
                yield Problem((f"deepspeed.{key}",), f"deepspeed.{key}: megagpt sets this key itself; {instead}")
    sections = {owned.partition(".")[0]: OBJECT for owned in OWNED_BY_MEGAGPT if "." in owned}
    for key, expected in {**sections, **DEEPSPEED_KEYS}.items():
        value = config.deepspeed.get(key)
        # DeepSpeed's short forms of sections would set a key that megagpt sets.
        if key in config.deepspeed and not _is_of_kind(value, expected):
            kind = expected if isinstance(expected, str) else " or ".join(f'"{text}"' for text in expected)
            yield Problem((f"deepspeed.{key}",), f"deepspeed.{key}: expected {kind}, not {_shortened(value)}")
    profiler = config.deepspeed.get("flops_profiler")
    enabled = profiler.get("enabled", False) if isinstance(profiler, dict) else False
    if not isinstance(enabled, bool):
        key = "deepspeed.flops_profiler.enabled"
        yield Problem((key,), f"{key}: expected {FLAG}, not {_shortened(enabled)}")


def _is_of_kind(value: Any, expected: str | tuple[str, ...]) -> bool:
    if isinstance(expected, tuple):
        return value is None or value in expected
    if expected == NUMBER:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, dict if expected == OBJECT else bool)


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def flat_keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the leaves of `tree`."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def data_parallel_size(config: Config, world_size: int) -> int:
    """Return the data-parallel size: world_size / (tensor x pipeline x context).

    Raises ConfigError, with the world sizes that fit, if `world_size` is not a multiple of tensor x pipeline x context or if
    the micro-batches of a step cannot be divided evenly among the data-parallel ranks.
    """
    parallel = config.parallel
    ranks_per_replica = parallel.tensor * parallel.pipeline * parallel.context
    micro_batches = _micro_batches(config)
    size, remainder = divmod(world_size, ranks_per_replica)
    if remainder == 0 and size > 0 and micro_batches % size == 0:
        return size
    fitting = [ranks_per_replica * divisor for divisor in divisors(micro_batches)]
    context = f" x context {parallel.context}" if parallel.context > 1 else ""
    raise ConfigError(
        f"parallel: a world of {world_size} ranks does not fit tensor {parallel.tensor} x pipeline "
        f"{parallel.pipeline}{context} x data, with {micro_batches} micro-batches (training.global_batch_size / "
        f"the micro-batch size{_in_ramp(config)}) to share; world sizes that fit: {_sizes(fitting)}"
    )


def _micro_batches(config: Config) -> int:
    """Return the micro-batches of a step, or the greatest common divisor over all batch sizes of a ramp."""
    training, ramp = config.training, config.training.batch_ramp
    full = training.global_batch_size // math.lcm(training.micro_batch_size, config.evaluation.micro_batch_size or 1)
    if ramp.start is None:
        return full
    return math.gcd(full, ramp.start // training.micro_batch_size, ramp.increment // training.micro_batch_size)


def _in_ramp(config: Config) -> str:
    return ", and for every size of training.batch_ramp" if config.training.batch_ramp.start is not None else ""


def divisors(number: int) -> list[int]:
    """Return all divisors of `number`, ascending."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _nearest_multiple(number: int, factor: int) -> int:
    """Return the multiple of `factor` nearest to `number`, at least `factor`."""
    return max(1, round(number / factor)) * factor


def _sizes(sizes: list[int]) -> str:
    shown = sizes if len(sizes) <= 12 else [*sizes[:11], sizes[-1]]
    return ", ".join(map(str, shown))


def _is_split(text: str) -> bool:
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        return False
    if len(shares) != 3 or not all(math.isfinite(share) and 0 <= share <= 1e12 for share in shares):
        return False
    return shares[0] > 0
