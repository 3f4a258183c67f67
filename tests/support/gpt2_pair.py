"""The same GPT-2 here and in transformers."""

import torch
import transformers

from megagpt.config import Config
from megagpt.model.gpt import GPTChunk
from support.runs import full_model, parameters_by_name

PAIRS = {
    "attention_norm.weight": "ln_1.weight",
    "attention_norm.bias": "ln_1.bias",
    "attention.proj.weight": "attn.c_proj.weight",
    "attention.proj.bias": "attn.c_proj.bias",
    "mlp_norm.weight": "ln_2.weight",
    "mlp_norm.bias": "ln_2.bias",
    "mlp.up.weight": "mlp.c_fc.weight",
    "mlp.up.bias": "mlp.c_fc.bias",
    "mlp.down.weight": "mlp.c_proj.weight",
    "mlp.down.bias": "mlp.c_proj.bias",
}
ENDS = {
    "embedding.token.weight": "transformer.wte.weight",
    "embedding.position.weight": "transformer.wpe.weight",
    "final_norm.weight": "transformer.ln_f.weight",
    "final_norm.bias": "transformer.ln_f.bias",
}


def to_megagpt(theirs: dict[str, torch.Tensor], heads: int, layers: int) -> dict[str, torch.Tensor]:
    """Return Hugging Face's tensors by megagpt's names: Conv1D is transposed, and qkv is ordered by head."""
    tensors = {name: theirs[other] for name, other in ENDS.items()}
    for layer in range(layers):
        for name, other in PAIRS.items():
            value = theirs[f"transformer.h.{layer}.{other}"]
            tensors[f"layers.{layer}.{name}"] = value.t() if value.dim() == 2 else value
        weight = theirs[f"transformer.h.{layer}.attn.c_attn.weight"]  # [hidden, 3 * hidden]
        bias, hidden = theirs[f"transformer.h.{layer}.attn.c_attn.bias"], weight.shape[0]
        head_dim = hidden // heads
        by_head = weight.t().view(3, heads, head_dim, hidden).transpose(0, 1).reshape(3 * hidden, hidden)
        tensors[f"layers.{layer}.attention.qkv.weight"] = by_head
        tensors[f"layers.{layer}.attention.qkv.bias"] = bias.view(3, heads, head_dim).transpose(0, 1).reshape(-1)
    return tensors


def gpt2_pair(config: Config) -> tuple[GPTChunk, transformers.GPT2LMHeadModel]:
    """Return megagpt's model of a config with the tanh GELU, and transformers' with the same random weights."""
    torch.manual_seed(0)
    model = config.model
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=model.n_positions,
            n_embd=model.n_embd,
            n_layer=model.n_layer,
            n_head=model.n_head,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            initializer_range=0.3,
        )
    )
    for parameter in theirs.parameters():  # norms and biases too
        parameter.data += 0.1 * torch.randn_like(parameter)
    chunk = full_model(config)
    parameters = parameters_by_name(chunk)
    values = to_megagpt(theirs.state_dict(), model.n_head, model.n_layer)
    assert parameters.keys() == values.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            entries = values[name].shape[0]
            parameter[:entries] = values[name]  # the padding entries of the vocabulary stay
    return chunk, theirs
