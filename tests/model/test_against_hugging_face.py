"""One process against Hugging Face GPT2LMHeadModel with the same weights: logits, loss and gradients.

fp32; the same sums in another order: 1e-5 relative to the largest value.
"""

import pytest
import torch
from support.runs import tiny_config

from megagpt.model.gpt import GPTChunk, MicroBatch, build_chunk
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.parameter import ParallelContext, shard_of

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


def to_ours(theirs: dict[str, torch.Tensor], heads: int, layers: int) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors under our names: Conv1D is transposed, and qkv stands head by head."""
    ours = {name: theirs[other] for name, other in ENDS.items()}
    for layer in range(layers):
        for name, other in PAIRS.items():
            value = theirs[f"transformer.h.{layer}.{other}"]
            ours[f"layers.{layer}.{name}"] = value.t() if value.dim() == 2 else value
        weight = theirs[f"transformer.h.{layer}.attn.c_attn.weight"]  # [hidden, 3 * hidden]
        bias, hidden = theirs[f"transformer.h.{layer}.attn.c_attn.bias"], weight.shape[0]
        head = hidden // heads
        by_head = weight.t().view(3, heads, head, hidden).transpose(0, 1).reshape(3 * hidden, hidden)
        ours[f"layers.{layer}.attention.qkv.weight"] = by_head
        ours[f"layers.{layer}.attention.qkv.bias"] = bias.view(3, heads, head).transpose(0, 1).reshape(-1)
    return ours


@pytest.fixture(scope="module")
def models() -> tuple[GPTChunk, "transformers.GPT2LMHeadModel", dict[str, torch.nn.Parameter]]:
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
    ours = build_chunk(config, ParallelContext(DeferredGradients()), range(model.n_layer))
    named = {shard_of(parameter).name: parameter for parameter in ours.parameters()}
    values = to_ours(theirs.state_dict(), model.n_head, model.n_layer)
    assert named.keys() == values.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            rows = values[name].shape[0]
            parameter[:rows] = values[name]  # the padding rows of the vocabulary stay
    return ours, theirs, named


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_logits(models) -> None:
    ours, theirs, _ = models
    tokens = torch.randint(0, 61, (3, 16))
    close(ours.logits(tokens), theirs(tokens).logits)


def test_loss_and_every_gradient(models) -> None:
    ours, theirs, named = models
    tokens = torch.randint(0, 61, (3, 17))
    labels = tokens[:, 1:].clone()
    labels[0, :5] = -100
    count = int((labels != -100).sum())
    loss = ours(None, MicroBatch(tokens[:, :-1], labels)) / count
    loss.backward()
    logits = theirs(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    theirs.zero_grad()
    expected.backward()
    close(loss.detach(), expected.detach())
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in to_ours(gradients, 4, 4).items():
        ours_gradient = named[name].grad
        close(ours_gradient[: gradient.shape[0]], gradient)
    assert not named["embedding.token.weight"].grad[61:].any()  # padding rows learn nothing


def test_the_cache_gives_the_logits_of_the_whole_text(models) -> None:
    from megagpt.model.attention import KVCache

    ours, _, _ = models
    ours.eval()
    tokens = torch.randint(0, 61, (1, 12))
    with torch.no_grad():
        whole = ours.logits(tokens)
        caches = {index: KVCache() for index in ours.layers}
        parts = [ours.logits(tokens[:, :5], caches)]
        parts += [ours.logits(tokens[:, i : i + 1], caches) for i in range(5, 12)]
    close(torch.cat(parts, 1), whole)
