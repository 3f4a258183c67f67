"""Arguments of Megatron-LM and keys of GPT-NeoX -> keys of megagpt. Pure functions; `docs/migrating.md` prints the tables."""

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megagpt.config.schema import Config
from megagpt.errors import ConfigError

Tree = dict[str, Any]
Values = dict[str, Any]
"""Names with underscores -> values of the foreign config."""

ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "relu2": "relu_squared"}
POSITIONS = {
    "learned_absolute": "learned",
    "learned": "learned",
    "rope": "rotary",
    "rotary": "rotary",
    "none": "none",
    "alibi": "alibi",
    "relative": "relative",
    "rpe": "relative",
}
DECAYS = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "WSD": "warmup-stable-decay",
    "inverse-square-root": "inverse-sqrt",
}
NORMS = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm", "layernorm": "layernorm", "rmsnorm": "rmsnorm"}
RECOMPUTE = {"full": "full", "selective": "selective"}

SAME_VALUE = {
    "num_layers": "model.n_layer",
    "hidden_size": "model.n_embd",
    "num_attention_heads": "model.n_head",
    "ffn_hidden_size": "model.ffn_hidden",
    "intermediate_size": "model.ffn_hidden",
    "kv_channels": "model.head_dim",
    "num_query_groups": "model.n_kv_head",
    "num_kv_heads": "model.n_kv_head",
    "seq_length": "model.n_positions",
    "vocab_size": "model.vocab_size",
    "padded_vocab_size": "model.vocab_size",
    "make_vocab_size_divisible_by": "model.vocab_multiple",
    "norm_epsilon": "model.layer_norm_epsilon",
    "layernorm_epsilon": "model.layer_norm_epsilon",
    "rms_norm_epsilon": "model.layer_norm_epsilon",
    "init_method_std": "model.init_std",
    "attention_dropout": "model.attn_pdrop",
    "rotary_base": "model.rotary.theta",
    "rotary_emb_base": "model.rotary.theta",
    "rotary_percent": "model.rotary.fraction",
    "rotary_pct": "model.rotary.fraction",
    "rpe_num_buckets": "model.relative_buckets",
    "relative_attention_num_buckets": "model.relative_buckets",
    "rpe_max_distance": "model.relative_max_distance",
    "relative_attention_max_distance": "model.relative_max_distance",
    "tensor_model_parallel_size": "parallel.tensor",
    "model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "context_parallel_size": "parallel.context",
    "micro_batch_size": "training.micro_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "global_batch_size": "training.global_batch_size",
    "train_batch_size": "training.global_batch_size",
    "train_iters": "training.steps",
    "seed": "training.seed",
    "recompute_num_layers": "training.recompute_layers",
    "checkpoint_num_layers": "training.recompute_layers",
    "lr": "optimizer.learning_rate",
    "min_lr": "lr_schedule.min_lr",
    "lr_warmup_iters": "lr_schedule.warmup_steps",
    "adam_eps": "optimizer.eps",
    "sgd_momentum": "optimizer.momentum",
    "weight_decay": "optimizer.weight_decay",
    "start_weight_decay": "optimizer.weight_decay",
    "end_weight_decay": "optimizer.final_weight_decay",
    "clip_grad": "optimizer.clip_grad",
    "gradient_clipping": "optimizer.clip_grad",
    "split": "data.split",
    "tokenizer_model": "data.tokenizer",
    "save": "checkpoint.dir",
    "save_interval": "checkpoint.interval",
    "checkpoint_factor": "checkpoint.interval",
    "keep_last_n_checkpoints": "checkpoint.keep",
    "eval_interval": "evaluation.interval",
    "log_interval": "logging.interval",
    "tensorboard_dir": "logging.tensorboard.dir",
    "wandb_project": "logging.wandb.project",
    "wandb_exp_name": "logging.wandb.name",
}
"""Foreign name -> our key with the same value."""
FLAGS = {
    "untie_embeddings_and_output_weights": ("model.tie_embeddings", False),
    "no_weight_tying": ("model.tie_embeddings", False),
    "add_qkv_bias": ("model.qkv_bias", True),
    "squared_relu": ("model.activation", "relu_squared"),
    "openai_gelu": ("model.activation", "gelu_tanh"),
    "qk_layernorm": ("model.qk_norm", "head"),
    "rotary_interleaved": ("model.rotary.interleaved", True),
    "use_rotary_position_embeddings": ("model.position_embedding", "rotary"),
    "sequence_parallel": ("parallel.sequence_parallel", True),
    "use_distributed_optimizer": ("zero.stage", 1),
    "bf16": ("training.precision", "bf16"),
    "fp16": ("training.precision", "fp16"),
    "recompute_activations": ("training.recompute", "selective"),
    "checkpoint_activations": ("training.recompute", "full"),
    "reset_position_ids": ("data.reset_positions", True),
    "reset_attention_mask": ("data.reset_attention", True),
    "eod_mask_loss": ("data.mask_document_ends", True),
}
"""Switch that is on -> our key and its value."""
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "normalization": ("model.norm", NORMS),
    "norm": ("model.norm", NORMS),
    "position_embedding_type": ("model.position_embedding", POSITIONS),
    "pos_emb": ("model.position_embedding", POSITIONS),
    "activation": ("model.activation", ACTIVATIONS),
    "lr_decay_style": ("lr_schedule.type", DECAYS),
    "recompute_granularity": ("training.recompute", RECOMPUTE),
    "precision": ("training.precision", {"bfloat16": "bf16", "fp16": "fp16", "fp32": "fp32"}),
    "weight_decay_incr_style": ("optimizer.weight_decay_schedule", {"linear": "linear", "cosine": "cosine", "constant": None}),
}
"""Name -> our key, and the values that have a counterpart."""
DEFAULTS: dict[str, Tree] = {
    "Megatron-LM": {
        "model.attn_pdrop": 0.1,
        "model.resid_pdrop": 0.1,
        "model.embd_pdrop": 0.1,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.weight_decay": 0.01,
        "lr_schedule.type": "linear",
    },
    "GPT-NeoX": {"optimizer.betas": [0.9, 0.999], "lr_schedule.type": "linear"},
}
"""Our keys for names that are absent, where the other program has another default than megagpt."""
NEOX_NAMES = frozenset({"pipe_parallel_size", "train_micro_batch_size_per_gpu", "pos_emb", "no_weight_tying"})
"""Names by which a config of GPT-NeoX is known."""
LAUNCHER_NAMES = frozenset({"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "num_gpus", "num_nodes"})
"""Arguments of the launcher in the same script."""
WITHOUT_EFFECT = frozenset(
    (
        "accumulate_allreduce_grads_in_fp32",
        "attention_backend",
        "attention_config",
        "attention_precision",
        "attention_softmax_in_fp32",
        "bias_gelu_fusion",
        "ckpt_format",
        "data_impl",
        "deepspeed",
        "distributed_backend",
        "distributed_backend_nccl",
        "distributed_timeout_minutes",
        "gradient_accumulation_fusion",
        "group_query_attention",
        "hostfile",
        "hysteresis",
        "launcher",
        "layernorm_fusion",
        "local_rank",
        "log_num_zeros_in_grad",
        "log_params_norm",
        "log_throughput",
        "log_timers_to_tensorboard",
        "loss_scale",
        "loss_scale_window",
        "max_position_embeddings",
        "min_scale",
        "mmap_warmup",
        "no_async_tensor_model_parallel_allreduce",
        "no_bias_dropout_fusion",
        "no_bias_gelu_fusion",
        "no_bias_swiglu_fusion",
        "no_gradient_accumulation_fusion",
        "no_load_optim",
        "no_load_rng",
        "no_masked_softmax_fusion",
        "no_rope_fusion",
        "num_workers",
        "output_layer_parallelism",
        "overlap_grad_reduce",
        "overlap_param_gather",
        "partition_activations",
        "recompute_method",
        "rope_fusion",
        "scaled_upper_triang_masked_softmax_fusion",
        "steps_per_print",
        "synchronize_each_layer",
        "tensorboard_log_interval",
        "timing_log_level",
        "tokenizer_type",
        "transformer_impl",
        "use_checkpoint_args",
        "use_flash_attn",
        "use_mcore_models",
        "use_wandb",
        "wall_clock_breakdown",
    )
)
"""Names that choose how others compute or log the same, and that megagpt needs no key for."""


@dataclass
class Converted:
    """Result of a conversion."""

    tree: Tree
    """Keys of megagpt, as a config file has them."""
    missing: list[str] = field(default_factory=list)
    """What has no counterpart, one sentence each."""
    ignored: list[str] = field(default_factory=list)
    """Names that need no counterpart."""


class _Builder:
    """Collects keys while names are used up."""

    def __init__(self, values: Values) -> None:
        self.values = dict(values)
        self.result = Converted({})

    def take(self, name: str, default: Any = None) -> Any:
        """Return a value and mark it as used."""
        return self.values.pop(name, default)

    def set(self, key: str, value: Any) -> None:
        """Set a dotted key, unless the value is None."""
        if value is None:
            return
        *sections, leaf = key.split(".")
        node = self.result.tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value

    def get(self, key: str) -> Any:
        node: Any = self.result.tree
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node

    def miss(self, name: str, value: Any, reason: str = "has no counterpart") -> None:
        self.result.missing.append(f"{name} {value}: {reason}")


_END = "::end::"
"""Word in the place of what ends an array of bash."""


def from_arguments(text: str) -> Values:
    """Return the arguments of Megatron-LM in a text: a command, a script, or a file with one argument per line.

    Words that are no arguments are skipped. Raises ConfigError if quotes do not match or if there is no argument.
    """
    text = re.sub(r"\w+=\(|\)", f" {_END} ", text.replace("\\\n", " "))  # arrays of bash: NAME=( ... )
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise ConfigError(f"the arguments cannot be read: {error}") from None
    values: Values = {}
    for word in words:
        if " --" in f" {word}":  # MODEL="--num-layers 32 ..." is one word of the shell
            values |= _arguments(re.sub(r"^\w+=(?=\s*--)", "", word).split())
    values |= _arguments([word for word in words if " --" not in word and not re.match(r"\w+=", word)])
    for name in LAUNCHER_NAMES:
        values.pop(name, None)
    if not values:
        raise ConfigError("no argument such as --num-layers was found")
    return values


def from_keys(tree: Tree) -> Values:
    """Return the keys of a YAML file of GPT-NeoX or Megatron-LM, with underscores; sections of Megatron-LM are joined."""
    values: Values = {}
    for name, value in tree.items():
        if name in ("language_model", "model_parallel") and isinstance(value, dict):
            values |= from_keys(value)
        else:
            values[str(name).replace("-", "_")] = value
    return values


def convert(values: Values) -> Converted:
    """Return megagpt's config for the arguments of Megatron-LM or the keys of GPT-NeoX."""
    build = _Builder(values)
    for rule in _RULES:
        rule(build)
    for name, key in SAME_VALUE.items():
        if name in build.values:
            build.set(key, build.take(name))
    for name, (key, choices) in CHOICES.items():
        if name in build.values:
            value = build.take(name)
            if isinstance(value, str) and value in choices:
                build.set(key, choices[value])
            else:
                build.miss(name, value, f"{key} has {', '.join(map(str, choices))}")
    for name, (key, value) in FLAGS.items():
        if build.values.get(name) is True:
            build.set(key, value)
        build.take(name)
    for name in [name for name in build.values if name in WITHOUT_EFFECT]:
        build.take(name)
        build.result.ignored.append(name)
    for name, value in build.values.items():
        if value not in (None, False):
            build.miss(name, value)
    defaults = DEFAULTS["GPT-NeoX" if NEOX_NAMES & values.keys() else "Megatron-LM"]
    for key, value in defaults.items():
        if build.get(key) is None:
            build.set(key, value)
    _finish(build)
    return build.result


def _optimizer(build: _Builder) -> None:
    """An object in GPT-NeoX, arguments in Megatron-LM, whose "adam" is AdamW."""
    kind = build.take("optimizer")
    parameters: Tree = {}
    if isinstance(kind, dict):
        parameters, kind = kind.get("params", {}), kind.get("type", "adam")
    if kind is not None:
        known = {"adam": "adamw", "adamw": "adamw", "sgd": "sgd"}
        if str(kind).lower() in known:
            build.set("optimizer.type", known[str(kind).lower()])
        else:
            build.miss("optimizer", kind)
    build.set("optimizer.learning_rate", parameters.get("lr"))
    build.set("optimizer.eps", parameters.get("eps"))
    betas = parameters.get("betas")
    first, second = build.take("adam_beta1"), build.take("adam_beta2")
    if betas is None and (first is not None or second is not None):
        betas = [0.9 if first is None else first, 0.999 if second is None else second]
    build.set("optimizer.betas", betas)


def _zero(build: _Builder) -> None:
    section = build.take("zero_optimization")
    if isinstance(section, dict):
        build.set("zero.stage", section.get("stage", 0))
        offload = section.get("offload_optimizer")
        build.set("zero.offload_optimizer", "cpu" if offload or section.get("cpu_offload") else None)


def _precision(build: _Builder) -> None:
    """GPT-NeoX: {"fp16": {"enabled": true}}. The first loss scale is a power of two in DeepSpeed."""
    scale = build.take("initial_loss_scale")
    if isinstance(scale, (int, float)) and scale >= 1 and build.values.get("fp16"):
        build.set("deepspeed.fp16.initial_scale_power", round(math.log2(scale)))
    if isinstance(build.values.get("fp16"), dict) and build.values["fp16"].get("enabled"):
        build.set("deepspeed.fp16.initial_scale_power", build.values["fp16"].get("initial_scale_power"))
    for name in ("fp16", "bf16"):
        if isinstance(build.values.get(name), dict):
            build.values[name] = bool(build.values[name].get("enabled"))


def _mlp(build: _Builder) -> None:
    if build.take("swiglu") is True or build.values.get("activation") == "swiglu":
        build.values.pop("activation", None)
        build.set("model.activation", "silu")
        build.set("model.gated_mlp", True)
    elif build.values.get("activation") == "geglu":
        build.values["activation"] = "gelu"
        build.set("model.gated_mlp", True)


def _biases(build: _Builder) -> None:
    if build.take("disable_bias_linear") is True:
        for key in ("qkv_bias", "attention_bias", "mlp_bias"):
            build.set(f"model.{key}", False)


def _dropout(build: _Builder) -> None:
    hidden = build.take("hidden_dropout")
    build.set("model.resid_pdrop", hidden)
    build.set("model.embd_pdrop", hidden)


def _parallel_branches(build: _Builder) -> None:
    tied = build.take("gpt_j_tied") is True
    if build.take("gpt_j_residual") is True:
        build.set("model.parallel_branches", "one_norm" if tied else "two_norms")


def _init(build: _Builder) -> None:
    first, last = build.take("init_method"), build.take("output_layer_init_method")
    if (first, last) == ("small_init", "wang_init"):
        build.set("model.init_scheme", "small_wang")
    elif first not in (None, "normal") or last not in (None, "scaled_normal", "normal"):
        build.miss("init_method", f"{first}, output_layer_init_method {last}", "model.init_scheme has other pairs")
    elif last == "normal":
        build.set("model.init_scheme", "plain")


def _window(build: _Builder) -> None:
    window = build.take("window_size", build.take("sliding_window_width"))
    if isinstance(window, str):
        window = [int(part) for part in window.strip("()").split(",")]
    if window is not None:
        # Megatron-LM gives the tokens before the present one.
        build.set("model.attention_window", window[0] + 1 if isinstance(window, list) else window)


def _pipeline(build: _Builder) -> None:
    size = build.take("pipe_parallel_size")
    build.set("parallel.pipeline", max(1, size) if isinstance(size, int) else None)
    layers = build.take("num_layers_per_virtual_pipeline_stage")
    total, stages = build.values.get("num_layers"), build.values.get("pipeline_model_parallel_size", 1)
    if isinstance(layers, int) and isinstance(total, int) and total // stages // layers > 1:
        build.set("parallel.virtual_stages", total // stages // layers)
        build.set("parallel.schedule", "interleaved_1f1b")


def _length(build: _Builder) -> None:
    samples, sequence = build.take("train_samples"), build.values.get("seq_length")
    if isinstance(samples, int) and isinstance(sequence, int):
        build.set("training.tokens", samples * sequence)
    minutes = build.take("exit_duration_in_mins")
    build.set("training.max_hours", minutes / 60 if isinstance(minutes, (int, float)) else None)
    ramp = build.take("rampup_batch_size")
    if isinstance(ramp, list) and len(ramp) == 3:
        build.set("training.batch_ramp", {"start": ramp[0], "increment": ramp[1], "samples": ramp[2]})


def _schedule(build: _Builder) -> None:
    steps = build.values.get("train_iters")
    share = build.take("lr_warmup_fraction", build.take("warmup"))
    if isinstance(share, (int, float)) and isinstance(steps, int):
        build.set("lr_schedule.warmup_steps", round(share * steps))
    decay, stable = build.take("lr_decay_iters"), build.take("lr_wsd_decay_iters")
    build.set("lr_schedule.decay_steps", stable if build.values.get("lr_decay_style") == "WSD" else decay)


def _evaluation(build: _Builder) -> None:
    iterations, size = build.take("eval_iters"), build.values.get("global_batch_size", build.values.get("train_batch_size"))
    if isinstance(iterations, int) and isinstance(size, int):
        build.set("evaluation.samples", max(1, iterations * size) if iterations else None)


def _data(build: _Builder) -> None:
    for names, key in (
        (("data_path",), "data.paths"),
        (("train_data_path", "train_data_paths"), "data.train"),
        (("valid_data_path", "valid_data_paths"), "data.valid"),
        (("test_data_path", "test_data_paths"), "data.test"),
    ):
        value = next((build.take(name) for name in names if name in build.values), None)
        weights = build.take(f"{key.removeprefix('data.')}_data_weights")
        build.set(key, _blend(value, weights))
    vocab, merges = build.take("vocab_file"), build.take("merge_file")
    if vocab is not None:
        build.set("data.tokenizer", vocab if merges is None else str(vocab).rpartition("/")[0] or ".")


def _load(build: _Builder) -> None:
    """A run that loads from where it saves resumes; a checkpoint of another program cannot be loaded."""
    load = build.take("load")
    if load is not None and load != build.values.get("save"):
        build.miss("load", load, "checkpoints of other programs cannot be loaded; convert the model by way of Hugging Face")


def _blend(value: Any, weights: Any) -> Any:
    if not isinstance(value, list):
        return value
    if isinstance(weights, list) and len(weights) == len(value):
        return dict(zip(value, weights, strict=True))
    if len(value) % 2 == 0 and all(isinstance(weight, (int, float)) for weight in value[::2]):
        return dict(zip(value[1::2], map(float, value[::2]), strict=True))
    return value[0] if len(value) == 1 else dict.fromkeys(map(str, value), 1.0)


_RULES: tuple[Callable[[_Builder], None], ...] = (
    *(_optimizer, _zero, _precision, _mlp, _biases, _dropout, _parallel_branches, _init, _window, _pipeline),
    *(_length, _schedule, _evaluation, _data, _load),
)
"""Names that go together, or whose values differ; they run before the tables."""


def _finish(build: _Builder) -> None:
    """Make the keys fit each other."""
    if build.get("training.steps") is not None and build.get("training.tokens") is not None:
        del build.result.tree["training"]["tokens"]
    if build.get("model.position_embedding") != "rotary" and build.get("model.rotary") is not None:
        del build.result.tree["model"]["rotary"]
    if build.get("parallel.sequence_parallel") and (build.get("parallel.tensor") or 1) == 1:
        del build.result.tree["parallel"]["sequence_parallel"]
    head, width, heads = (build.get(f"model.{key}") for key in ("head_dim", "n_embd", "n_head"))
    if head is not None and head * (heads or 0) == width:
        del build.result.tree["model"]["head_dim"]
    if build.get("data.paths") is None and build.get("data.split") is not None:
        del build.result.tree["data"]["split"]
    order = list(Config.model_fields)
    build.result.tree = dict(sorted(build.result.tree.items(), key=lambda item: order.index(item[0])))


def _arguments(words: list[str]) -> Values:
    """Return the arguments in a list of words: the words after an argument are its values."""
    values: Values = {}
    name: str | None = None
    for word in words:
        if word == _END or "[@]" in word or word in ("$@", "$*"):
            name = None
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            values[name] = _parsed(value) if equals else True
        elif name is not None and not word.startswith("-"):
            values[name] = _with(values[name], _parsed(word))
    return values


def _with(earlier: Any, value: Any) -> Any:
    """Return the value of an argument after one more word."""
    if earlier is True:
        return value
    return [*earlier, value] if isinstance(earlier, list) else [earlier, value]


def _parsed(text: str) -> Any:
    """Return a number if the text is one."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else text
    return {"true": True, "false": False}.get(text.lower(), text)
