"""The families of Hugging Face models that megagpt's block covers: one table of names for each, used in both directions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megagpt.config.schema import ModelConfig
from megagpt.hugging_face.rules import ByBucket, ByHead, Conv1DByHead, Rule, Same, Stacked, Transposed

Rules = dict[str, Rule]
"""Name of a parameter in megagpt, without its layer -> the tensors of Hugging Face that it consists of."""


@dataclass(frozen=True)
class Encoder:
    """The encoder of an architecture, and the biases of relative positions."""

    layer_prefix: str
    """Prefix of the tensors of layer {}."""
    layer: Callable[[ModelConfig], Rules]
    """The parameters of one layer."""
    biases: Callable[[ModelConfig], Rules]
    """The biases of both stacks, which their layers share."""


@dataclass(frozen=True)
class Family:
    """One architecture of transformers."""

    architecture: str
    """Name of the class, as in "architectures" of config.json."""
    layer_prefix: str
    """Prefix of the tensors of layer {}."""
    ends: Rules
    """Embeddings, final norm, and the output layer if it is not tied."""
    layer: Callable[[ModelConfig], Rules]
    """The parameters of one layer, which depend on the model: grouped heads, biases, norms."""
    base_prefix: str
    """Prefix that names lack in a folder of the base model, which has no output layer."""
    buffers: str = r".*\.rotary_emb\.inv_freq"
    """Pattern of tensors that are computed from the config; older versions of transformers stored them."""
    encoder: Encoder | None = None
    """The encoder, if the architecture has one."""

    def rules(self, model: ModelConfig) -> Iterator[tuple[str, Rule, str]]:
        """Yield (parameter name, rule, prefix of the rule's names) for every parameter of the model."""
        for name, rule in self.ends.items():
            if name != "head.weight" or not model.tie_embeddings:
                yield name, rule, ""
        if self.encoder is not None:
            for name, rule in self.encoder.biases(model).items():
                yield name, rule, ""
            yield from _layers("encoder.layers", model.encoder_layers, self.encoder.layer(model), self.encoder.layer_prefix)
        yield from _layers("layers", model.n_layer, self.layer(model), self.layer_prefix)


def _layers(ours: str, n_layers: int, rules: Rules, theirs: str) -> Iterator[tuple[str, Rule, str]]:
    for index in range(n_layers):
        for name, rule in rules.items():
            yield f"{ours}.{index}.{name}", rule, theirs.format(index)


def _gpt2_layer(model: ModelConfig) -> Rules:
    return {
        "attention_norm.weight": Same("ln_1.weight"),
        "attention_norm.bias": Same("ln_1.bias"),
        "attention.qkv.weight": Conv1DByHead("attn.c_attn.weight", model.n_head),
        "attention.qkv.bias": Conv1DByHead("attn.c_attn.bias", model.n_head),
        "attention.proj.weight": Transposed("attn.c_proj.weight"),
        "attention.proj.bias": Same("attn.c_proj.bias"),
        "mlp_norm.weight": Same("ln_2.weight"),
        "mlp_norm.bias": Same("ln_2.bias"),
        "mlp.up.weight": Transposed("mlp.c_fc.weight"),
        "mlp.up.bias": Same("mlp.c_fc.bias"),
        "mlp.down.weight": Transposed("mlp.c_proj.weight"),
        "mlp.down.bias": Same("mlp.c_proj.bias"),
    }


def _gpt_neox_layer(model: ModelConfig) -> Rules:
    both = {
        "attention_norm": "input_layernorm",
        "attention.qkv": "attention.query_key_value",  # ordered by head, as ours
        "attention.proj": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }
    rules: Rules = {f"{ours}.{kind}": Same(f"{theirs}.{kind}") for ours, theirs in both.items() for kind in ("weight", "bias")}
    if not model.qkv_bias:
        del rules["attention.qkv.bias"], rules["attention.proj.bias"]
    return rules


def _llama_attention(model: ModelConfig) -> Rules:
    """Return the rules of LLaMA's attention and MLP, which later families share."""
    rules: Rules = {}
    for kind, present in (("weight", True), ("bias", model.qkv_bias)):
        query, key, value = (f"self_attn.{letter}_proj.{kind}" for letter in "qkv")
        if present and model.kv_heads == model.n_head:
            rules[f"attention.qkv.{kind}"] = ByHead((query, key, value), model.n_head)
        elif present:
            rules[f"attention.q.{kind}"] = Same(query)
            rules[f"attention.kv.{kind}"] = Stacked((key, value))
    rules["attention.proj.weight"] = Same("self_attn.o_proj.weight")
    if model.attention_bias:
        rules["attention.proj.bias"] = Same("self_attn.o_proj.bias")
    for kind, present in (("weight", True), ("bias", model.mlp_bias)):
        if present:
            rules[f"mlp.gate_up.{kind}"] = Stacked((f"mlp.gate_proj.{kind}", f"mlp.up_proj.{kind}"))
            rules[f"mlp.down.{kind}"] = Same(f"mlp.down_proj.{kind}")
    return rules


def _llama_layer(model: ModelConfig) -> Rules:
    return _llama_attention(model) | {
        "attention_norm.weight": Same("input_layernorm.weight"),
        "mlp_norm.weight": Same("post_attention_layernorm.weight"),
    }


def _qwen3_layer(model: ModelConfig) -> Rules:
    return _llama_layer(model) | {
        "attention.query_norm.weight": Same("self_attn.q_norm.weight"),
        "attention.key_norm.weight": Same("self_attn.k_norm.weight"),
    }


def _olmo2_layer(model: ModelConfig) -> Rules:
    return _llama_attention(model) | {
        "attention.query_norm.weight": Same("self_attn.q_norm.weight"),
        "attention.key_norm.weight": Same("self_attn.k_norm.weight"),
        "attention_output_norm.weight": Same("post_attention_layernorm.weight"),
        "mlp_output_norm.weight": Same("post_feedforward_layernorm.weight"),
    }


def _gemma2_layer(model: ModelConfig) -> Rules:
    return _llama_attention(model) | {
        "attention_norm.weight": Same("input_layernorm.weight"),
        "attention_output_norm.weight": Same("post_attention_layernorm.weight"),
        "mlp_norm.weight": Same("pre_feedforward_layernorm.weight"),
        "mlp_output_norm.weight": Same("post_feedforward_layernorm.weight"),
    }


def _t5_attention(model: ModelConfig, ours: str, theirs: str) -> Rules:
    query, key, value = (f"{theirs}.{letter}.weight" for letter in "qkv")
    if ours == "attention" and model.kv_heads == model.n_head:
        projections: Rules = {"attention.qkv.weight": ByHead((query, key, value), model.n_head)}
    else:
        projections = {f"{ours}.q.weight": Same(query), f"{ours}.kv.weight": Stacked((key, value))}
    return projections | {f"{ours}.proj.weight": Same(f"{theirs}.o.weight")}


def _t5_mlp(model: ModelConfig, sublayer: int) -> Rules:
    name = f"layer.{sublayer}.DenseReluDense"
    up: Rules = {"mlp.up.weight": Same(f"{name}.wi.weight")}
    if model.gated_mlp:
        up = {"mlp.gate_up.weight": Stacked((f"{name}.wi_0.weight", f"{name}.wi_1.weight"))}
    return up | {"mlp.down.weight": Same(f"{name}.wo.weight"), "mlp_norm.weight": Same(f"layer.{sublayer}.layer_norm.weight")}


def _t5_encoder_layer(model: ModelConfig) -> Rules:
    norm: Rules = {"attention_norm.weight": Same("layer.0.layer_norm.weight")}
    return norm | _t5_attention(model, "attention", "layer.0.SelfAttention") | _t5_mlp(model, 1)


def _t5_layer(model: ModelConfig) -> Rules:
    norms: Rules = {
        "attention_norm.weight": Same("layer.0.layer_norm.weight"),
        "cross_norm.weight": Same("layer.1.layer_norm.weight"),
    }
    own = _t5_attention(model, "attention", "layer.0.SelfAttention")
    return norms | own | _t5_attention(model, "cross_attention", "layer.1.EncDecAttention") | _t5_mlp(model, 2)


def _t5_biases(model: ModelConfig) -> Rules:
    theirs = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return {f"{stack}.relative_bias.weight": ByBucket(theirs.format(stack), model.n_head) for stack in ("encoder", "decoder")}


_LLAMA_ENDS: Rules = {
    "embedding.token.weight": Same("model.embed_tokens.weight"),
    "final_norm.weight": Same("model.norm.weight"),
    "head.weight": Same("lm_head.weight"),
}
_GPT2 = Family(
    "GPT2LMHeadModel",
    "transformer.h.{}.",
    {
        "embedding.token.weight": Same("transformer.wte.weight"),
        "embedding.position.weight": Same("transformer.wpe.weight"),
        "final_norm.weight": Same("transformer.ln_f.weight"),
        "final_norm.bias": Same("transformer.ln_f.bias"),
        "head.weight": Same("lm_head.weight"),
    },
    _gpt2_layer,
    "transformer.",
    r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",
)
_GPT_NEOX = Family(
    "GPTNeoXForCausalLM",
    "gpt_neox.layers.{}.",
    {
        "embedding.token.weight": Same("gpt_neox.embed_in.weight"),
        "final_norm.weight": Same("gpt_neox.final_layer_norm.weight"),
        "final_norm.bias": Same("gpt_neox.final_layer_norm.bias"),
        "head.weight": Same("embed_out.weight"),  # its name in files; transformers 5 has lm_head in memory
    },
    _gpt_neox_layer,
    "gpt_neox.",
    r".*\.attention\.(rotary_emb\.inv_freq|(masked_)?bias)",
)
_T5 = Family(
    "T5ForConditionalGeneration",
    "decoder.block.{}.",
    {
        "embedding.token.weight": Same("shared.weight"),
        "encoder.final_norm.weight": Same("encoder.final_layer_norm.weight"),
        "final_norm.weight": Same("decoder.final_layer_norm.weight"),
        "head.weight": Same("lm_head.weight"),
    },
    _t5_layer,
    "",
    # Copies of the embedding, and a bias of cross-attention in files of the first releases, which is not used.
    r"(encoder|decoder)\.embed_tokens\.weight|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    Encoder("encoder.block.{}.", _t5_encoder_layer, _t5_biases),
)
FAMILIES = {
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "llama": Family("LlamaForCausalLM", "model.layers.{}.", _LLAMA_ENDS, _llama_layer, "model."),
    "mistral": Family("MistralForCausalLM", "model.layers.{}.", _LLAMA_ENDS, _llama_layer, "model."),
    "qwen2": Family("Qwen2ForCausalLM", "model.layers.{}.", _LLAMA_ENDS, _llama_layer, "model."),
    "qwen3": Family("Qwen3ForCausalLM", "model.layers.{}.", _LLAMA_ENDS, _qwen3_layer, "model."),
    "olmo2": Family("Olmo2ForCausalLM", "model.layers.{}.", _LLAMA_ENDS, _olmo2_layer, "model."),
    "t5": _T5,
    "gemma2": Family("Gemma2ForCausalLM", "model.layers.{}.", _LLAMA_ENDS, _gemma2_layer, "model."),
}
"""`model_type` of config.json -> family."""
