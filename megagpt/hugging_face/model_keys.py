"""The config.json of each family: one table of keys, used in both directions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megagpt.config.compare import differing_keys
from megagpt.config.schema import ModelConfig
from megagpt.hugging_face.keys import (
    Always,
    Choice,
    Depths,
    EmbeddingScale,
    FeedForward,
    KeyRule,
    LayerWindows,
    Number,
    OneWindow,
    QueryScalar,
    Renamed,
    Rope,
    ScaledScores,
    Shared,
    TiedAndScaled,
    Tree,
    UnsupportedError,
    Unused,
)

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
}
"""Names of transformers -> names of megagpt."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of config.json that a tokenizer or generation_config.json decides."""
IGNORED = frozenset(
    {
        *TOKEN_IDS,
        *("_name_or_path", "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "torchscript"),
        *("use_cache", "use_return_dict", "return_dict", "output_attentions", "output_hidden_states", "attn_implementation"),
        *("_attn_implementation", "_attn_implementation_autoset", "cache_implementation", "gradient_checkpointing"),
        *("pretraining_tp", "reorder_and_upcast_attn", "n_ctx", "is_decoder", "classifier_dropout", "use_bfloat16"),
        *(
            "id2label",
            "label2id",
            "num_labels",
            "problem_type",
            "task_specific_params",
            "finetuning_task",
            "summary_activation",
        ),
        *("summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "tokenizer_class"),
        *("return_dict_in_generate", "chunk_size_feed_forward", "unsloth_version", "unsloth_fixed", "sep_token_id"),
    }
)
"""Keys of config.json that do not change the logits of a causal model."""


@dataclass(frozen=True)
class ModelKeys:
    """The config.json of one family."""

    rules: tuple[KeyRule, ...]
    fixed: Tree
    """Keys of the model that are the same in every model of the family."""
    heads_divide_width: bool = True
    """Whether transformers refuses a width that is no multiple of the number of heads."""

    def to_model(self, theirs: Mapping[str, Any]) -> Tree:
        """Return the section `model` for a config.json, without keys that have their default.

        Raises UnsupportedError for a key or a value without a counterpart. A key with the value null counts as absent.
        """
        known = {*IGNORED, *(name for rule in self.rules for name in rule.names), "num_hidden_layers", "hidden_size"}
        for key, value in theirs.items():
            if key not in known and value is not None:
                raise UnsupportedError(key, "a key with a counterpart in megagpt; remove it if it does not change the logits")
        model = dict(self.fixed)
        for rule in self.rules:
            model |= rule.to_model(theirs)
        return {key: value for key, value in model.items() if value is not None}

    def from_model(self, model: ModelConfig) -> Tree:
        """Return the config.json for a model, without keys of tokens and versions."""
        return {key: value for rule in self.rules for key, value in rule.from_model(model).items()}

    def missing(self, model: ModelConfig) -> dict[str, tuple[object, object]]:
        """Return what the family cannot express: keys of the model, with its value and the one that the family has."""
        try:
            back = ModelConfig.model_validate(self.to_model(self.from_model(model)))
        except UnsupportedError as error:
            return {error.key: ("this model", error.expected)}
        differences = differing_keys(model, back)
        if self.heads_divide_width and model.n_embd % model.n_head:
            differences["n_head"] = (model.n_head, f"a divisor of n_embd {model.n_embd}")
        return differences


def _shape() -> tuple[KeyRule, ...]:
    return (
        Renamed("vocab_size", "vocab_size"),
        Renamed("hidden_size", "n_embd"),
        Renamed("num_hidden_layers", "n_layer"),
        Renamed("num_attention_heads", "n_head"),
        Renamed("max_position_embeddings", "n_positions"),
        Number("intermediate_size", "ffn_hidden", "ffn_hidden_size"),
        Renamed("initializer_range", "init_std", 0.02),
    )


_SILU = Choice("hidden_act", "activation", ACTIVATIONS, "silu")


def _llama(
    tied: bool = False,
    kv_heads: Any = None,
    head_dim: int | None = None,
    epsilon: float = 1e-6,
    activation: KeyRule = _SILU,
) -> tuple[KeyRule, ...]:
    """Return the keys that LLaMA and its successors share. `tied` to `epsilon`: defaults of absent keys."""
    return (
        *_shape(),
        Number("num_key_value_heads", "n_kv_head", "kv_heads", kv_heads),
        Number("head_dim", "head_dim", "head_size", head_dim),
        Renamed("rms_norm_eps", "layer_norm_epsilon", epsilon),
        Renamed("tie_word_embeddings", "tie_embeddings", tied),
        Renamed("attention_dropout", "attn_pdrop", 0.0),
        activation,
        Rope(),
    )


_ATTENTION_BIAS = Shared("attention_bias", ("qkv_bias", "attention_bias"), False)
_LLAMA_FIXED: Tree = {
    "position_embedding": "rotary",
    "norm": "rmsnorm",
    "gated_mlp": True,
    "qkv_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN_WINDOWS = LayerWindows(switch=True)
MODEL_KEYS: dict[str, ModelKeys] = {
    "gpt2": ModelKeys(
        (
            Renamed("vocab_size", "vocab_size"),
            Renamed("n_embd", "n_embd"),
            Renamed("n_layer", "n_layer"),
            Renamed("n_head", "n_head"),
            Renamed("n_positions", "n_positions"),
            Renamed("n_inner", "ffn_hidden", None),
            Renamed("initializer_range", "init_std", 0.02),
            Renamed("layer_norm_epsilon", "layer_norm_epsilon", 1e-5),
            Renamed("tie_word_embeddings", "tie_embeddings", True),
            Renamed("embd_pdrop", "embd_pdrop", 0.1),
            Renamed("attn_pdrop", "attn_pdrop", 0.1),
            Renamed("resid_pdrop", "resid_pdrop", 0.1),
            Choice("activation_function", "activation", {"gelu_new": "gelu_tanh", **ACTIVATIONS}, "gelu_new"),
            ScaledScores(),
            Always("scale_attn_by_inverse_layer_idx", (False,)),
            Always("add_cross_attention", (False,)),
        ),
        {"position_embedding": "learned", "norm": "layernorm"},
    ),
    "gpt_neox": ModelKeys(
        (
            *_shape(),
            Renamed("layer_norm_eps", "layer_norm_epsilon", 1e-5),
            Renamed("tie_word_embeddings", "tie_embeddings", False),
            Renamed("attention_dropout", "attn_pdrop", 0.0),
            Shared("hidden_dropout", ("embd_pdrop", "resid_pdrop"), 0.0),
            Shared("attention_bias", ("qkv_bias", "attention_bias"), True),
            Choice("hidden_act", "activation", ACTIVATIONS, "gelu"),
            Choice("use_parallel_residual", "parallel_branches", {True: "two_norms", False: "no"}, True),
            Rope(partial=True),
        ),
        {"position_embedding": "rotary", "norm": "layernorm"},
    ),
    "llama": ModelKeys((*_llama(), _ATTENTION_BIAS, Renamed("mlp_bias", "mlp_bias", False)), _LLAMA_FIXED),
    "mistral": ModelKeys((*_llama(kv_heads=8), OneWindow()), _LLAMA_FIXED, heads_divide_width=False),
    "qwen2": ModelKeys((*_llama(), _QWEN_WINDOWS), {**_LLAMA_FIXED, "qkv_bias": True}, heads_divide_width=False),
    "qwen3": ModelKeys(
        (*_llama(head_dim=128), _ATTENTION_BIAS, _QWEN_WINDOWS), {**_LLAMA_FIXED, "qk_norm": "head"}, heads_divide_width=False
    ),
    "olmo2": ModelKeys(
        (*_llama(epsilon=1e-5), _ATTENTION_BIAS),
        {**_LLAMA_FIXED, "qk_norm": "width", "norm_placement": "after"},
        heads_divide_width=False,
    ),
    "t5": ModelKeys(
        (
            Renamed("vocab_size", "vocab_size"),
            Renamed("d_model", "n_embd", 512),
            Number("d_kv", "head_dim", "head_size", 64),
            Number("d_ff", "ffn_hidden", "ffn_hidden_size", 2048),
            Depths(),
            Renamed("num_heads", "n_head", 8),
            Renamed("n_positions", "n_positions", 512),  # relative biases have no limit; of the first releases
            Renamed("relative_attention_num_buckets", "relative_buckets", 32),
            Renamed("relative_attention_max_distance", "relative_max_distance", 128),
            Renamed("layer_norm_epsilon", "layer_norm_epsilon", 1e-6),
            Shared("dropout_rate", ("embd_pdrop", "attn_pdrop", "resid_pdrop", "mlp_pdrop"), 0.1),
            FeedForward({name: ours for name, ours in ACTIVATIONS.items() if name != "gelu_pytorch_tanh"}),
            TiedAndScaled(),
            Always("is_encoder_decoder", (True,)),
            Renamed("decoder_start_token_id", "decoder_start", 0),
            Unused(("initializer_factor", "output_past")),
        ),
        {
            "position_embedding": "relative",
            "norm": "rmsnorm",
            "qkv_bias": False,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_scale": 1.0,
        },
        heads_divide_width=False,
    ),
    "gemma2": ModelKeys(
        (
            *_llama(
                tied=True,
                kv_heads=4,
                head_dim=256,
                activation=Choice("hidden_activation", "activation", ACTIVATIONS, "gelu_pytorch_tanh"),
            ),
            _ATTENTION_BIAS,
            Renamed("attn_logit_softcapping", "attention_softcap", 50.0),
            Renamed("final_logit_softcapping", "logit_softcap", 30.0),
            QueryScalar(),
            EmbeddingScale(),
            LayerWindows(switch=False),
            Always("use_bidirectional_attention", (None, False)),
            Always("hidden_act", ("gelu_pytorch_tanh", None)),  # hidden_activation decides; older files have both
        ),
        {**_LLAMA_FIXED, "norm": "rmsnorm_plus_one", "norm_placement": "both"},
    ),
}
"""`model_type` of config.json -> its keys."""
