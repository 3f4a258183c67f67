"""One process equals Hugging Face's GPT2LMHeadModel with the same weights: logits, loss and gradients.

fp32; the same sums in another order: 1e-5 relative to the largest value.
"""

import pytest
import torch
from support.cached import cached_logits
from support.runs import full_model, parameters_by_name, tiny_config

from megagpt.model.forward_context import MicroBatch
from megagpt.model.gpt import GPTChunk

transformers = pytest.importorskip("transformers")

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


@pytest.fixture(scope="module")
def models() -> tuple[GPTChunk, "transformers.GPT2LMHeadModel", dict[str, torch.nn.Parameter]]:
    """megagpt's model, Hugging Face's model, and megagpt's parameters by name."""
    torch.manual_seed(0)
    config = tiny_config(model={"activation": "gelu_tanh", "init_std": 0.3})
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
    return chunk, theirs, parameters


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_logits_are_equal(models) -> None:
    chunk, theirs, _ = models
    tokens = torch.randint(0, 61, (3, 16))
    close(chunk.logits(tokens), theirs(tokens).logits)


def test_the_loss_and_every_gradient_are_equal(models) -> None:
    chunk, theirs, parameters = models
    tokens = torch.randint(0, 61, (3, 17))
    labels = tokens[:, 1:].clone()
    labels[0, :5] = -100
    count = int((labels != -100).sum())
    loss = chunk(None, MicroBatch(tokens[:, :-1], labels)) / count
    loss.backward()
    logits = theirs(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    theirs.zero_grad()
    expected.backward()
    close(loss.detach(), expected.detach())
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in to_megagpt(gradients, 4, 4).items():
        close(parameters[name].grad[: gradient.shape[0]], gradient)
    assert not parameters["embedding.token.weight"].grad[61:].any()  # padding entries learn nothing


def test_the_cache_gives_the_logits_of_the_full_text(models) -> None:
    chunk, _, _ = models
    chunk.eval()
    tokens = torch.randint(0, 61, (1, 12))
    with torch.no_grad():
        full = chunk.logits(tokens)
        pieces = cached_logits(chunk, tokens, [5, *[1] * 7])
    close(pieces, full[:, 4:])
