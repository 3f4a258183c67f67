"""How keys of a Hugging Face config.json and keys of megagpt's section `model` stand for each other.

Each rule reads some keys of config.json and gives keys of the model, and the other way round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megagpt.config.schema import ModelConfig

Tree = dict[str, Any]


class UnsupportedError(Exception):
    """A key of config.json whose value has no counterpart in megagpt."""

    def __init__(self, key: str, expected: str) -> None:
        super().__init__(f"{key}: expected {expected}")
        self.key = key
        self.expected = expected


class KeyRule(Protocol):
    """Some keys of config.json and what they mean."""

    @property
    def names(self) -> tuple[str, ...]:
        """Keys of config.json that the rule reads or writes."""

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        """Return keys of the section `model`; None stands for the default. Raises UnsupportedError."""

    def from_model(self, model: ModelConfig) -> Tree:
        """Return keys of config.json; what they cannot express is found by converting them back."""


MAX_LAYERS = 10_000
REQUIRED = object()
"""Default of a key that every config.json has."""


@dataclass(frozen=True)
class Renamed:
    """The same value under another name."""

    theirs: str
    ours: str
    default: Any = REQUIRED
    """Value of transformers for an absent key."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.theirs,)

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        return {self.ours: value_of(theirs, self.theirs, self.default)}

    def from_model(self, model: ModelConfig) -> Tree:
        return {self.theirs: getattr(model, self.ours)}


@dataclass(frozen=True)
class Number:
    """A number of theirs that ours replaces by a property of the model if it is absent, such as the size of a head."""

    theirs: str
    ours: str
    resolved: str
    """Property of ModelConfig with the value, never None."""
    default: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.theirs,)

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        return {self.ours: value_of(theirs, self.theirs, self.default)}

    def from_model(self, model: ModelConfig) -> Tree:
        return {self.theirs: getattr(model, self.resolved)}


@dataclass(frozen=True)
class Shared:
    """One key of theirs for several of ours: a bias of queries, keys, values and the output projection, or a dropout."""

    theirs: str
    ours: tuple[str, ...]
    default: Any

    @property
    def names(self) -> tuple[str, ...]:
        return (self.theirs,)

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        return dict.fromkeys(self.ours, value_of(theirs, self.theirs, self.default))

    def from_model(self, model: ModelConfig) -> Tree:
        return {self.theirs: getattr(model, self.ours[-1])}


@dataclass(frozen=True)
class Choice:
    """A key whose values have other names: theirs -> ours. Back, the first of theirs with that meaning is written."""

    theirs: str
    ours: str
    values: Mapping[Any, Any]
    default: Any

    @property
    def names(self) -> tuple[str, ...]:
        return (self.theirs,)

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        value = value_of(theirs, self.theirs, self.default)
        if not isinstance(value, (str, bool)) or value not in self.values:
            raise UnsupportedError(self.theirs, " or ".join(map(str, self.values)))
        return {self.ours: self.values[value]}

    def from_model(self, model: ModelConfig) -> Tree:
        ours = getattr(model, self.ours)
        return {self.theirs: next((name for name, value in self.values.items() if value == ours), self.default)}


@dataclass(frozen=True)
class Always:
    """A key that must have one of some values, because megagpt has no counterpart for others. The first is the default."""

    theirs: str
    values: tuple[Any, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.theirs,)

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        if value_of(theirs, self.theirs, self.values[0]) not in self.values:
            raise UnsupportedError(self.theirs, " or ".join(map(str, self.values)))
        return {}

    def from_model(self, model: ModelConfig) -> Tree:
        return {}


@dataclass(frozen=True)
class Unused:
    """Keys of one family that do not change the logits."""

    names: tuple[str, ...]

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        return {}

    def from_model(self, model: ModelConfig) -> Tree:
        return {}


@dataclass(frozen=True)
class Depths:
    """T5's numbers of layers; the decoder has as many as the encoder if its number is absent."""

    names: tuple[str, ...] = ("num_layers", "num_decoder_layers")

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        encoder, decoder = theirs.get("num_layers", 6), theirs.get("num_decoder_layers")
        return {"encoder_layers": encoder, "n_layer": encoder if decoder is None else decoder}

    def from_model(self, model: ModelConfig) -> Tree:
        return {"num_layers": model.encoder_layers, "num_decoder_layers": model.n_layer}


@dataclass(frozen=True)
class FeedForward:
    """T5's feed_forward_proj: an activation, or "gated-" and an activation."""

    activations: Mapping[str, str]
    """Names of theirs -> names of ours."""
    names: tuple[str, ...] = ("feed_forward_proj", "dense_act_fn", "is_gated_act")

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        given = str(theirs.get("feed_forward_proj", "relu"))
        gate, _, name = given.rpartition("-")
        name = "gelu_new" if given == "gated-gelu" else name  # the published models of that name have the approximation
        if gate not in ("", "gated") or name not in self.activations:
            raise UnsupportedError("feed_forward_proj", f'{" or ".join(self.activations)}, or one of them after "gated-"')
        return {"activation": self.activations[name], "gated_mlp": bool(gate)}

    def from_model(self, model: ModelConfig) -> Tree:
        name = next((name for name, ours in self.activations.items() if ours == model.activation), "relu")
        if not model.gated_mlp:
            return {"feed_forward_proj": name}
        return {"feed_forward_proj": "gated-gelu" if model.activation == "gelu_tanh" else f"gated-{name}"}


@dataclass(frozen=True)
class TiedAndScaled:
    """T5 v1.0 ties the output layer and scales its input by 1 / sqrt(width); v1.1 does neither.

    transformers 5 writes tie_word_embeddings true in every case, and scale_decoder_outputs.
    """

    names: tuple[str, ...] = ("tie_word_embeddings", "scale_decoder_outputs")

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        tied = theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings", True))
        return {"tie_embeddings": tied, "output_scale": positive(theirs, "d_model", 512) ** -0.5 if tied else 1.0}

    def from_model(self, model: ModelConfig) -> Tree:
        return {"tie_word_embeddings": model.tie_embeddings}


@dataclass(frozen=True)
class EmbeddingScale:
    """Gemma multiplies the token embeddings by the square root of their width; config.json has no key for it."""

    names: tuple[str, ...] = ()

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        return {"embedding_scale": positive(theirs, "hidden_size") ** 0.5}

    def from_model(self, model: ModelConfig) -> Tree:
        return {}


@dataclass(frozen=True)
class QueryScalar:
    """Gemma's query_pre_attn_scalar: scores are divided by its square root."""

    names: tuple[str, ...] = ("query_pre_attn_scalar",)

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        return {"attention_scale": positive(theirs, "query_pre_attn_scalar", 256) ** -0.5}

    def from_model(self, model: ModelConfig) -> Tree:
        scale = model.attention_scale or model.head_size**-0.5
        return {"query_pre_attn_scalar": round(scale**-2)}


@dataclass(frozen=True)
class ScaledScores:
    """GPT-2's scale_attn_weights: whether scores are divided by the square root of the head size."""

    names: tuple[str, ...] = ("scale_attn_weights",)

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        return {"attention_scale": None if value_of(theirs, "scale_attn_weights", True) else 1.0}

    def from_model(self, model: ModelConfig) -> Tree:
        return {"scale_attn_weights": model.attention_scale != 1.0}


@dataclass(frozen=True)
class OneWindow:
    """Mistral's sliding_window, the same in every layer; null for full attention."""

    names: tuple[str, ...] = ("sliding_window", "layer_types")

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        return windows(theirs.get("layer_types"), value_of(theirs, "sliding_window", 4096))

    def from_model(self, model: ModelConfig) -> Tree:
        return {"sliding_window": model.attention_window}


@dataclass(frozen=True)
class LayerWindows:
    """Sliding windows in some layers: the list layer_types, or the keys that it comes from if it is absent."""

    switch: bool
    """Whether a key use_sliding_window turns the windows on (Qwen); else every second layer has full attention (Gemma 2)."""

    @property
    def names(self) -> tuple[str, ...]:
        return ("sliding_window", "layer_types", *(("use_sliding_window", "max_window_layers") if self.switch else ()))

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        window = value_of(theirs, "sliding_window", 4096)
        layers = int(positive(theirs, "num_hidden_layers"))
        if layers > MAX_LAYERS:
            raise UnsupportedError("num_hidden_layers", f"at most {MAX_LAYERS}")
        if self.switch and not theirs.get("use_sliding_window"):
            window = None
        kinds = theirs.get("layer_types")
        if kinds is None:
            first = value_of(theirs, "max_window_layers", 28)
            full = [layer < first if self.switch else layer % 2 == 1 for layer in range(layers)]
            kinds = ["full_attention" if is_full else "sliding_attention" for is_full in full]
        return windows(kinds, window)

    def from_model(self, model: ModelConfig) -> Tree:
        kinds = ["full_attention" if model.window_of(layer) is None else "sliding_attention" for layer in range(model.n_layer)]
        keys: Tree = {"sliding_window": model.attention_window or 4096, "layer_types": kinds}
        if self.switch:
            keys |= {"max_window_layers": 0} if model.attention_window is not None else {}
            keys |= {"use_sliding_window": model.attention_window is not None}
        return keys


def windows(kinds: Sequence[str] | None, window: int | None) -> Tree:
    """Return the keys of the model for a list of "full_attention" and "sliding_attention". Raises UnsupportedError."""
    if window is None or (kinds is not None and set(kinds) == {"full_attention"}):
        return {"attention_window": None}
    if kinds is None or set(kinds) == {"sliding_attention"}:
        return {"attention_window": window}
    full = [layer + 1 for layer, kind in enumerate(kinds) if kind == "full_attention"]
    every = full[0] if full else 1
    if set(kinds) != {"full_attention", "sliding_attention"} or full != list(range(every, len(kinds) + 1, every)):
        raise UnsupportedError("layer_types", '"full_attention" in every n-th layer and "sliding_attention" in the others')
    return {"attention_window": window, "full_attention_every": every}


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings: rope_parameters of transformers 5, or rope_theta and rope_scaling of earlier versions.

    Both forms are written, so that every version can read them.
    """

    partial: bool = False
    """Whether the family can rotate a part of each head (GPT-NeoX)."""

    @property
    def names(self) -> tuple[str, ...]:
        older = ("rotary_emb_base", "rotary_pct") if self.partial else ()
        return ("rope_parameters", "rope_theta", "rope_scaling", *older)

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        given = {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
        kind = given.pop("rope_type", given.pop("type", "default"))
        given.pop("type", None)
        base = theirs.get("rotary_emb_base", 10000.0) if self.partial else 10000.0
        fraction = given.pop("partial_rotary_factor", theirs.get("rotary_pct", 0.25) if self.partial else 1.0)
        if not self.partial and fraction != 1:
            raise UnsupportedError("rope_parameters.partial_rotary_factor", "1")
        rotary: Tree = {"theta": given.pop("rope_theta", theirs.get("rope_theta") or base), "fraction": fraction}
        if kind not in _SCALING:
            raise UnsupportedError("rope_parameters.rope_type", " or ".join(_SCALING))
        scaling, keys = _SCALING[kind]
        original = given.pop("original_max_position_embeddings", None)
        if kind in ("yarn", "llama3"):
            given["original_max_position_embeddings"] = original or value_of(theirs, "max_position_embeddings")
        missing = [key for key in keys if key not in given and key not in _OPTIONAL]
        if missing:
            raise UnsupportedError(f"rope_parameters.{missing[0]}", f"a number, with rope_type {kind}")
        for key, value in given.items():
            if key in keys:
                rotary[keys[key]] = value
            elif value is not None and not (key == "truncate" and value is True):
                raise UnsupportedError(
                    f"rope_parameters.{key}", f"only {', '.join(keys) or 'rope_theta'} with rope_type {kind}"
                )
        return {"rotary": {**rotary, "scaling": scaling}}

    def from_model(self, model: ModelConfig) -> Tree:
        rotary = model.rotary
        kind = next((kind for kind, (scaling, _) in _SCALING.items() if scaling == rotary.scaling), "default")
        scaling = {theirs: getattr(rotary, ours) for theirs, ours in _SCALING[kind][1].items()}
        usual = {"beta_fast": 32.0, "beta_slow": 1.0}
        scaling = {key: value for key, value in scaling.items() if value != usual.get(key)}
        parameters: Tree = {"rope_type": kind, "rope_theta": rotary.theta, **scaling}
        if self.partial:
            parameters["partial_rotary_factor"] = rotary.fraction
        older: Tree = {"rope_theta": rotary.theta, "rope_scaling": None if kind == "default" else parameters}
        if self.partial:
            older |= {"rotary_emb_base": rotary.theta, "rotary_pct": rotary.fraction}
        return {"rope_parameters": parameters, **older}


_FACTOR = {"factor": "factor"}
_ORIGINAL = {**_FACTOR, "original_max_position_embeddings": "original_positions"}
_SCALING: dict[str, tuple[str, dict[str, str]]] = {
    "default": ("none", {}),
    "linear": ("linear", _FACTOR),
    "yarn": ("yarn", {**_ORIGINAL, "beta_fast": "beta_fast", "beta_slow": "beta_slow"}),
    "llama3": ("llama3", {**_ORIGINAL, "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}),
}
"""rope_type -> (model.rotary.scaling, its keys of theirs -> keys of model.rotary)."""
_OPTIONAL = ("beta_fast", "beta_slow")
"""Keys of rope_parameters for which transformers has a default."""


def value_of(theirs: Mapping[str, Any], key: str, default: Any = REQUIRED) -> Any:
    """Return the value of a key, or the default if it is absent. Raises UnsupportedError if it is required."""
    value = theirs.get(key, default)
    if value is REQUIRED or (value is None and default is REQUIRED):
        raise UnsupportedError(key, "a value; the key is required")
    return value


def positive(theirs: Mapping[str, Any], key: str, default: Any = REQUIRED) -> float:
    """Return a number above 0. Raises UnsupportedError for anything else."""
    value = value_of(theirs, key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise UnsupportedError(key, "a number above 0")
    return float(value)
