"""FlexAttention computes what `ExplicitAttention` and masked scaled_dot_product_attention compute.

torch refuses its backward on a CPU, because its CPU kernel has none. The tests skip that check, and run the operator's
definition with torch's "aot_eager" instead of a kernel. fp32; the same sums in another order: 1e-5 relative to the largest
value.
"""

from collections.abc import Iterator

import pytest
import torch
from support.runs import Tree, full_model, parameters_by_name, tiny_config
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex

from megagpt.model import flex_attention
from megagpt.model.attention import attention_mask
from megagpt.model.forward_context import MicroBatch
from megagpt.model.gpt import GPTChunk

MODELS: dict[str, Tree] = {
    "documents": {},
    "windows, grouped heads, cap": {
        "n_kv_head": 2,
        "attention_window": 5,
        "full_attention_every": 2,
        "attention_softcap": 3.0,
        "position_embedding": "rotary",
    },
    "learned bias, sinks": {"position_embedding": "relative", "relative_buckets": 6, "attention_sinks": True},
    "ALiBi": {"position_embedding": "alibi"},
}
TOKENS = torch.randint(0, 61, (2, 25), generator=torch.Generator().manual_seed(0))
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 14 + [2] * 7, [0] * 24])


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention on the CPU, with a backward and small heads."""
    compiled = torch.compile(torch_flex.flex_attention, backend="aot_eager", dynamic=False, fullgraph=True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda query, key, value: None)
    monkeypatch.setattr(flex_attention, "_compiled_attention", lambda: compiled)
    monkeypatch.setattr(flex_attention, "DEVICES", ("cpu",))
    monkeypatch.setattr(flex_attention, "SMALLEST_HEAD", 8)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(name: str, flex: bool = True) -> GPTChunk:
    return full_model(
        tiny_config(model={"init_std": 0.3, "n_positions": 24, **MODELS[name]}, training={"flex_attention": flex})
    )


def batch_of(name: str) -> MicroBatch:
    return MicroBatch(TOKENS[:, :-1], TOKENS[:, 1:], documents=DOCUMENTS if name == "documents" or "cap" in name else None)


def loss_and_gradients(model: GPTChunk, name: str) -> dict[str, torch.Tensor]:
    loss = model(None, batch_of(name))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in parameters_by_name(model).items() if parameter.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_explicit_scores(name: str, on_cpu: None) -> None:
    counters.clear()
    actual, expected = (loss_and_gradients(model_of(name, flex), name) for flex in (True, False))
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=0, atol=1e-5 * value.abs().max().item(), msg=key)
    n_windows = 2 if "window" in name else 1
    assert counters["stats"]["unique_graphs"] == n_windows, "layers of a kind share one compiled kernel"


@pytest.mark.parametrize("window", [None, 1, 100, 128, 200, 300])
@pytest.mark.parametrize("length", [1, 128, 130, 384])
@pytest.mark.parametrize("with_documents", [False, True])
def test_the_blocks_hold_each_visible_pair_and_skip_hidden_blocks(
    window: int | None, length: int, with_documents: bool
) -> None:
    documents = None
    if with_documents:
        starts = torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < 0.02
        starts[1, 100:] = False
        documents = starts.cumsum(1)
    mask = flex_attention.block_mask(documents, window, length, torch.device("cpu"))
    dense = attention_mask(documents, window, length, torch.float32, torch.device("cpu"))
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = causal.expand(mask.shape[0], -1, -1) if dense is None else (dense == 0)[:, 0]
    n_blocks = -(-length // 128)
    for row in range(len(visible)):
        for query in range(n_blocks):
            partial = mask.kv_indices[row, 0, query, : mask.kv_num_blocks[row, 0, query]].tolist()
            assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
            full = mask.full_kv_indices[row, 0, query, : mask.full_kv_num_blocks[row, 0, query]].tolist()
            for key in range(n_blocks):
                pairs = visible[row, 128 * query : 128 * (query + 1), 128 * key : 128 * (key + 1)]
                assert (key in full) <= bool(pairs.all()) and (key in partial) + (key in full) == bool(pairs.any())
    positions = torch.arange(length)
    rule = mask.mask_mod(
        torch.arange(len(visible)).view(-1, 1, 1), torch.zeros((), dtype=torch.int64), positions.view(-1, 1), positions
    )
    assert torch.equal(rule.expand_as(visible), visible)


@pytest.mark.parametrize("name", MODELS)
def test_no_tensor_of_all_pairs_of_positions_is_made_or_saved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention itself is replaced by a product of the queries; its own kernels save its inputs and its output."""
    length = 256
    monkeypatch.setattr(flex_attention, "DEVICES", ("cpu",))
    monkeypatch.setattr(flex_attention, "SMALLEST_HEAD", 8)

    def stand_in(query: torch.Tensor, *args: object, return_aux: torch_flex.AuxRequest, **kwargs: object) -> object:
        return query * 2, torch_flex.AuxOutput(lse=query.sum(-1) if return_aux.lse else None)

    monkeypatch.setattr(flex_attention, "_compiled_attention", lambda: stand_in)
    model = full_model(tiny_config(model={**MODELS[name], "n_positions": length}))
    tokens = torch.zeros(1, length, dtype=torch.int64)
    seen: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor))
            return out

    with Sizes():
        documents = torch.zeros_like(tokens) if name == "documents" else None
        model(None, MicroBatch(tokens, tokens, documents=documents)).backward()
    # The largest tensors: 4 x 32 columns in the MLP, 128 logits.
    assert max(seen) == 128 * length < length * length
