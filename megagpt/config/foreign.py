"""Arguments of Megatron-LM and keys of GPT-NeoX -> keys of megagpt. Pure functions."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megagpt.config.foreign_arguments import COMPUTED, Repeated
from megagpt.config.foreign_tables import CHOICES, DEFAULTS, FLAGS, NEOX_NAMES, SAME_VALUE, WITHOUT_EFFECT
from megagpt.config.schema import Config

Tree = dict[str, Any]
Values = dict[str, Any]
"""Names with underscores -> values of the foreign config."""


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
    """Collects keys while names are used up. A value is set or reported, never dropped."""

    def __init__(self, values: Values) -> None:
        self.values: Values = {}
        self.result = Converted({})
        for name, value in values.items():
            if isinstance(value, Repeated):
                self.miss(name, value.earlier, f"is given again; {value.last} is used")
                value = value.last
            if value == COMPUTED or (isinstance(value, list) and COMPUTED in value):
                self.miss(name, "", "is computed by the shell; give its value")
            else:
                self.values[name] = value

    def take(self, name: str, default: Any = None) -> Any:
        """Return a value and mark it as used."""
        return self.values.pop(name, default)

    def take_number(self, name: str) -> float | int | None:
        """Return a value that must be a number and mark it as used; report another one."""
        value = self.take(name)
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            return value
        self.miss(name, value, "expected a number")
        return None

    def set(self, key: str, value: Any) -> None:
        """Set a dotted key, unless the value is None. Another value than the one that it has is reported."""
        if value is None:
            return
        earlier = self.get(key)
        if earlier is not None and earlier != value:
            self.miss(key, earlier, f"contradicts {value}, which is used")
        *sections, leaf = key.split(".")
        node = self.result.tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value

    def get(self, key: str) -> Any:
        """Return the value of a dotted key, or None."""
        node: Any = self.result.tree
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node

    def miss(self, name: str, value: Any, reason: str = "has no counterpart") -> None:
        """Report what is not converted."""
        self.result.missing.append(f"{name} {value}".rstrip() + f": {reason}")

    def miss_rest(self, name: str, section: Tree, used: tuple[str, ...]) -> None:
        """Report the keys of a section that are not used."""
        for key, value in section.items():
            if key not in used and key not in WITHOUT_EFFECT:
                self.miss(f"{name}.{key}", value)


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
        switch = build.take(name)
        if switch is True:
            build.set(key, value)
        elif switch not in (None, False):
            build.miss(name, switch, "is a switch without a value")
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
        build.miss_rest("optimizer", kind, ("type", "params"))
        parameters, kind = kind.get("params") or {}, kind.get("type", "adam")
        build.miss_rest("optimizer.params", parameters, ("lr", "betas", "eps"))
    if kind is not None:
        known = {"adam": "adamw", "adamw": "adamw", "sgd": "sgd"}
        if str(kind).lower() in known:
            build.set("optimizer.type", known[str(kind).lower()])
        else:
            build.miss("optimizer", kind)
    build.set("optimizer.learning_rate", parameters.get("lr"))
    build.set("optimizer.eps", parameters.get("eps"))
    betas = parameters.get("betas")
    first, second = build.take_number("adam_beta1"), build.take_number("adam_beta2")
    if betas is None and (first is not None or second is not None):
        betas = [0.9 if first is None else first, 0.999 if second is None else second]
    build.set("optimizer.betas", betas)


_ZERO_BUFFERS = (
    *("allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "overlap_comm", "reduce_bucket_size"),
    *("reduce_scatter", "load_from_fp32_weights", "round_robin_gradients"),
)
"""Keys of DeepSpeed that choose how it communicates."""


def _zero(build: _Builder) -> None:
    section = build.take("zero_optimization")
    if isinstance(section, dict):
        build.miss_rest("zero_optimization", section, (*_ZERO_BUFFERS, "stage", "offload_optimizer", "cpu_offload"))
        build.set("zero.stage", section.get("stage", 0))
        offload = section.get("offload_optimizer")
        build.set("zero.offload_optimizer", "cpu" if offload or section.get("cpu_offload") else None)
    elif section is not None:
        build.miss("zero_optimization", section, "expected a section")


def _precision(build: _Builder) -> None:
    """GPT-NeoX: {"fp16": {"enabled": true}}. The first loss scale is a power of two in DeepSpeed."""
    scale = build.take_number("initial_loss_scale")
    if scale is not None and build.values.get("fp16"):
        if scale >= 1:
            build.set("deepspeed.fp16.initial_scale_power", round(math.log2(scale)))
        else:
            build.miss("initial_loss_scale", scale, "expected 1 or more")
    for name in ("fp16", "bf16"):
        section = build.values.get(name)
        if isinstance(section, dict):
            build.miss_rest(name, section, ("enabled", "type", "initial_scale_power", "loss_scale_window", "min_loss_scale"))
            build.values[name] = bool(section.get("enabled"))
            if name == "fp16" and section.get("enabled"):
                build.set("deepspeed.fp16.initial_scale_power", section.get("initial_scale_power"))


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
        parts = [part.strip() for part in window.strip("()").split(",")]
        window = [int(part) for part in parts] if all(re.fullmatch(r"-?\d+", part) for part in parts) else window
    if isinstance(window, list) and window and all(isinstance(part, int) for part in window):
        build.set("model.attention_window", window[0] + 1)  # Megatron-LM gives the tokens before the present one
    elif isinstance(window, int):
        build.set("model.attention_window", window)
    elif window is not None:
        build.miss("window_size", window, "expected a number of tokens, or two such as (1023,0)")


def _pipeline(build: _Builder) -> None:
    size = build.take_number("pipe_parallel_size")
    build.set("parallel.pipeline", None if size is None else max(1, size))
    layers = build.take_number("num_layers_per_virtual_pipeline_stage")
    total, stages = build.values.get("num_layers"), build.values.get("pipeline_model_parallel_size", 1)
    if layers is None:
        return
    if not (isinstance(total, int) and isinstance(stages, int) and min(total, stages, layers) >= 1):
        build.miss("num_layers_per_virtual_pipeline_stage", layers, "needs num_layers and pipeline_model_parallel_size")
    elif total // stages // layers > 1:
        build.set("parallel.virtual_stages", int(total // stages // layers))
        build.set("parallel.schedule", "interleaved_1f1b")


def _length(build: _Builder) -> None:
    samples, sequence = build.take_number("train_samples"), build.values.get("seq_length")
    if samples is not None and build.values.get("train_iters") is not None:
        build.miss("train_samples", samples, "contradicts train_iters, which is used")
    elif samples is not None and isinstance(sequence, int):
        build.set("training.tokens", samples * sequence)
    elif samples is not None:
        build.miss("train_samples", samples, "needs seq_length")
    minutes = build.take_number("exit_duration_in_mins")
    build.set("training.max_hours", None if minutes is None else minutes / 60)
    ramp = build.take("rampup_batch_size")
    if isinstance(ramp, list) and len(ramp) == 3 and all(isinstance(number, int) for number in ramp):
        build.set("training.batch_ramp", {"start": ramp[0], "increment": ramp[1], "samples": ramp[2]})
    elif ramp is not None:
        build.miss("rampup_batch_size", ramp, "expected three integers: first size, increment, samples")


def _schedule(build: _Builder) -> None:
    steps = build.values.get("train_iters")
    for name in ("lr_warmup_fraction", "warmup"):
        share = build.take_number(name)
        if share is not None and isinstance(steps, int):
            build.set("lr_schedule.warmup_steps", round(share * steps))
        elif share is not None:
            build.miss(name, share, "needs train_iters; set lr_schedule.warmup_steps")
    decay, stable = build.take("lr_decay_iters"), build.take("lr_wsd_decay_iters")
    if build.values.get("lr_decay_style") == "WSD":
        decay, unused = stable, ("lr_decay_iters", decay)
    else:
        unused = ("lr_wsd_decay_iters", stable)
    build.set("lr_schedule.decay_steps", decay)
    if unused[1] is not None:
        build.miss(*unused, f"has no effect with lr_decay_style {build.values.get('lr_decay_style')}")


def _evaluation(build: _Builder) -> None:
    iterations, size = build.take_number("eval_iters"), build.values.get("global_batch_size")
    size = build.values.get("train_batch_size", size)
    if iterations and isinstance(size, int):
        build.set("evaluation.samples", int(iterations * size))
    elif iterations:
        build.miss("eval_iters", iterations, "needs global_batch_size; set evaluation.samples")


def _data(build: _Builder) -> None:
    for names, key in (
        (("data_path",), "data.paths"),
        (("train_data_path", "train_data_paths"), "data.train"),
        (("valid_data_path", "valid_data_paths"), "data.valid"),
        (("test_data_path", "test_data_paths"), "data.test"),
    ):
        value = next((build.take(name) for name in names if name in build.values), None)
        weights = build.take(f"{key.removeprefix('data.')}_data_weights")
        build.set(key, _blend(build, names[-1], value, weights))
    vocab, merges = build.take("vocab_file"), build.take("merge_file")
    if vocab is not None:
        build.set("data.tokenizer", vocab if merges is None else str(vocab).rpartition("/")[0] or ".")
    elif merges is not None:
        build.miss("merge_file", merges, "needs vocab_file")


def _load(build: _Builder) -> None:
    """A run that loads from where it saves resumes; a checkpoint of another program cannot be loaded."""
    load = build.take("load")
    if load is not None and load != build.values.get("save"):
        build.miss("load", load, "checkpoints of other programs cannot be loaded; convert the model by way of Hugging Face")


def _blend(build: _Builder, name: str, value: Any, weights: Any) -> Any:
    """Return data sources as megagpt has them: a path, or paths with their weights; report what is neither."""
    values = value if isinstance(value, list) else [value]
    pairs = list(zip(values[1::2], values[::2], strict=False))
    if value is None or (len(values) == 1 and weights is None):
        return values[0]
    if weights is not None:
        if isinstance(weights, list) and len(weights) == len(values) and all(map(_is_number, weights)):
            return dict(zip(map(str, values), weights, strict=True))
        build.miss(name, value, f"expected as many weights as paths, found {weights}")
    elif len(values) % 2 == 0 and all(_is_number(weight) and not _is_number(path) for path, weight in pairs):
        return {path: float(weight) for path, weight in pairs}
    elif any(map(_is_number, values)):
        build.miss(name, value, "expected paths, or pairs of a weight and a path")
    else:
        return dict.fromkeys(map(str, values), 1.0)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_RULES: tuple[Callable[[_Builder], None], ...] = (
    *(_optimizer, _zero, _precision, _mlp, _biases, _dropout, _parallel_branches, _init, _window, _pipeline),
    *(_length, _schedule, _evaluation, _data, _load),
)
"""Names that go together, or whose values differ; they run before the tables."""


def _finish(build: _Builder) -> None:
    """Make the keys fit each other."""
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
