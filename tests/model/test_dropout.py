"""Where dropout acts in the model: losses and gradients equal a forward written out in float64 with masks from numpy.

The model runs in float64 too, but its loss starts from fp32 logits: relative 1e-6 on losses, and 1e-5 of the largest value
on gradients.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from support.runs import Tree, full_model, parameters_by_name, tiny_config
from torch import Tensor

from megagpt.config.schema import ModelConfig
from megagpt.model.dropout import ResidualDropout
from megagpt.model.dropout_masks import token_keys
from megagpt.model.explicit_attention import QUERY_BLOCK
from megagpt.model.forward_context import ForwardContext, MicroBatch
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.seeding import stable_seed

SAMPLES = [11, 2**33]
DROPOUT: Tree = {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3, "mlp_pdrop": 0.15}


def numpy_keep(seed: int, length: int, site: tuple[int | str, ...], columns: int, p: float) -> npt.NDArray[np.bool_]:
    """Compute a mask, [samples, length, columns], in unsigned arithmetic."""

    def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        return x ^ (x >> np.uint64(33))

    with np.errstate(over="ignore"):
        samples = np.array(SAMPLES, np.uint64) + np.uint64(stable_seed(seed, "dropout"))
        keys = mix(mix(samples)[:, None] + np.arange(length, dtype=np.uint64)) ^ np.uint64(stable_seed("dropout", *site))
        x = keys.astype(np.uint32)[..., None] ^ np.arange(columns, dtype=np.uint32)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = x ^ (keys >> np.uint64(32)).astype(np.uint32)[..., None]
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x.view(np.int32) >= round(p * 2**32) - 2**31


class Reference:
    """GPT-2 with dropout, written out for all positions and heads at once."""

    def __init__(self, weights: Mapping[str, Tensor], model: ModelConfig, seed: int) -> None:
        self.weights = weights
        self.model = model
        self.seed = seed

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the token losses."""
        w, model = self.weights, self.model
        x = w["embedding.token.weight"][tokens] + w["embedding.position.weight"][: tokens.shape[1]]
        x = self.drop(x, model.embd_pdrop, "embedding")
        for layer in range(model.n_layer):
            name = f"layers.{layer}"
            out = self.attention(layer, self.norm(x, f"{name}.attention_norm"))
            x = x + self.drop(out, model.resid_pdrop, layer, "attention residual")
            hidden = F.gelu(self.linear(self.norm(x, f"{name}.mlp_norm"), f"{name}.mlp.up"))
            hidden = self.drop(hidden, model.mlp_pdrop, f"{name}.mlp", "hidden")
            x = x + self.drop(self.linear(hidden, f"{name}.mlp.down"), model.resid_pdrop, layer, "mlp residual")
        logits = self.norm(x, "final_norm") @ w["embedding.token.weight"][: model.tokens_in_vocab].T
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    def attention(self, layer: int, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        heads = self.model.n_head
        qkv = self.linear(x, f"layers.{layer}.attention.qkv").view(batch, length, heads, 3, hidden // heads)
        query, key, value = qkv.permute(3, 0, 2, 1, 4)  # each [batch, heads, seq, head_dim]
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / (hidden // heads) ** 0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        by_query = weights.transpose(1, 2).flatten(2)  # a row of the mask is a query, a column is a pair of a head and a key
        dropped = self.drop(by_query, self.model.attn_pdrop, layer, "attention weights")
        weights = dropped.view(batch, length, heads, length).transpose(1, 2)
        out = torch.einsum("bhqk,bhkd->bqhd", weights, value).flatten(2)
        return self.linear(out, f"layers.{layer}.attention.proj")

    def drop(self, x: Tensor, p: float, *site: int | str) -> Tensor:
        keep = torch.from_numpy(numpy_keep(self.seed, x.shape[1], site, x.shape[2], p))
        return torch.where(keep, x / (1 - p), 0.0)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self.weights[f"{name}.bias"], self.model.layer_norm_epsilon)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("length", [16, QUERY_BLOCK + 5])
def test_losses_and_gradients_are_those_of_a_forward_written_out_in_float64(length: int, recompute: str) -> None:
    config = tiny_config(model={**DROPOUT, "n_layer": 2, "n_positions": length}, training={"recompute": recompute})
    tokens = torch.randint(0, 61, (2, length + 1), generator=torch.Generator().manual_seed(0))
    chunk = full_model(config).double().train()
    reference = {name: parameter.detach().clone().requires_grad_() for name, parameter in parameters_by_name(chunk).items()}
    loss = chunk(None, MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.tensor(SAMPLES)))
    expected = Reference(reference, config.model, config.training.seed).loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in parameters_by_name(chunk).items():
        gradient = reference[name].grad
        assert gradient is not None and parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def test_training_draws_nothing_from_a_generator() -> None:
    chunk = full_model(tiny_config(model=DROPOUT)).train()
    tokens = torch.zeros(2, 17, dtype=torch.int64)
    before = torch.default_generator.get_state()
    chunk(None, MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.tensor(SAMPLES))).backward()
    assert torch.equal(torch.default_generator.get_state(), before)


def test_training_without_sample_numbers_is_an_error_and_evaluation_needs_none() -> None:
    chunk = full_model(tiny_config(model=DROPOUT))
    tokens = torch.zeros(2, 17, dtype=torch.int64)
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:])
    with pytest.raises(ValueError, match=r"needs MicroBatch\.samples"):
        chunk.train()(None, batch)
    without = full_model(tiny_config())
    assert torch.equal(chunk.eval()(None, batch), without(None, batch))


def test_the_mean_over_many_samples_is_the_value_without_dropout() -> None:
    """Of 20,000 samples: within five standard deviations, each p / (1 - p) x^2 / n."""
    n, p = 20_000, 0.25
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(1, 3, 8)
    ctx = ForwardContext(token_keys=token_keys(1, torch.arange(n), 3))
    mean = ResidualDropout(p, ParallelContext(), "site").train()(x.expand(n, 3, 8), ctx).mean(0, keepdim=True)
    assert ((mean - x).abs() <= 5 * x.abs() * (p / (1 - p) / n) ** 0.5).all()
