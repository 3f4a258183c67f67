"""The config of a tiny model with an encoder, for tests."""

from pathlib import Path
from typing import Any

import torch

from megagpt.config import Config
from megagpt.inference.load import load_hugging_face
from megagpt.model.encoder_decoder import EncoderDecoderChunk
from support.runs import Tree, tiny_config

T5: Tree = {
    "encoder_layers": 4,
    "encoder_positions": 24,
    "position_embedding": "relative",
    "relative_buckets": 8,
    "relative_max_distance": 20,
    "norm": "rmsnorm",
    "gated_mlp": True,
    "activation": "gelu_tanh",
    "ffn_hidden": 48,
    "qkv_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
}
"""Keys of the section model: T5 v1.1, with other numbers of positions in the two stacks, and a tied embedding."""


def t5_config(**sections: Tree) -> Config:
    """Return the config of a tiny T5, with keys of any section replaced."""
    model = {**T5, **sections.pop("model", {})}
    return tiny_config(model=model, **sections)


def hugging_face_t5(version: str, **keys: Any) -> Any:
    """Return a tiny T5 of transformers with random weights: "v1.0" or "v1.1"."""
    import transformers

    old = version == "v1.0"
    config = transformers.T5Config(
        vocab_size=61,
        d_model=32,
        d_kv=12,
        d_ff=48,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        dropout_rate=0.0,
        feed_forward_proj="relu" if old else "gated-gelu",
        tie_word_embeddings=old,
        decoder_start_token_id=0,
        **keys,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not old:  # transformers 5 ties new models of both versions; the published v1.1 files have a matrix of their own
        model.lm_head.weight = torch.nn.Parameter(torch.empty(61, 32))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "layer_norm" in name
            parameter.normal_(mean=1.0 if is_norm else 0.0, std=0.3)
    return model


def loaded_t5(theirs: Any, folder: Path) -> EncoderDecoderChunk:
    """Return a model of transformers as this project's."""
    theirs.save_pretrained(folder)
    model, _ = load_hugging_face(folder)
    assert isinstance(model, EncoderDecoderChunk)
    return model
