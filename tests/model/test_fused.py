"""The compiled form of every memory-bound function equals the eager form, which torch differentiates.

In fp32, so that both differ by the order of sums only. Compilation by inductor takes seconds per function, so one model is
compiled by it, where there is a C++ compiler. The others run the graphs that it would get ("aot_eager"): those show whether
our backward formulas are right.
"""

import shutil
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.pool import Pool
from support.runs import Tree, compare, tiny_config, train
from torch import Tensor

from megagpt.config import Config
from megagpt.model.chunk import build_chunk
from megagpt.model.forward_context import MicroBatch
from megagpt.parallel import kernels as kernels_module
from megagpt.parallel.kernels import Kernels
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import shard_of

has_compiler = any(shutil.which(name) for name in ("g++", "clang++"))
needs_compiler = pytest.mark.skipif(not has_compiler, reason="needs a C++ compiler")
LLAMA: Tree = {
    "position_embedding": "rotary",
    "norm": "rmsnorm",
    "gated_mlp": True,
    "activation": "silu",
    "ffn_hidden": 48,
    "n_kv_head": 2,
    "attention_bias": False,
    "tie_embeddings": False,
}
CASES: dict[str, tuple[str, Tree, Tree]] = {
    "GPT-2, dropout, label smoothing": ("inductor", {"resid_pdrop": 0.1, "embd_pdrop": 0.1}, {"label_smoothing": 0.1}),
    "LLaMA with biases, capped logits, z-loss": ("aot_eager", {**LLAMA, "logit_softcap": 3.0}, {"z_loss": 1e-2}),
}


def compile_by(backend: str) -> Any:
    """Compile functions by a backend of torch.compile, within a `with` block."""

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)

    return patch.object(kernels_module, "_compile", compiled)


def loss_and_gradients(config: Config, kernels: Kernels) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of a micro-batch of 2, with some labels masked, and the gradients of all weights."""
    model = build_chunk(config, ParallelContext(kernels=kernels), range(config.model.n_layer)).train()
    generator = torch.Generator().manual_seed(1)
    shape = (2, config.model.n_positions)
    tokens, labels = (torch.randint(0, config.model.tokens_in_vocab, shape, generator=generator) for _ in range(2))
    labels[0, :3] = -100
    loss = model(None, MicroBatch(tokens, labels, samples=torch.tensor([3, 4])))
    loss.backward()
    return loss.item(), {shard_of(p).name: p.grad for p in model.parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [pytest.param(next(iter(CASES)), marks=needs_compiler), *list(CASES)[1:]])
def test_compiled_functions_give_the_loss_and_the_gradients_of_eager_ones(name: str) -> None:
    backend, model, training = CASES[name]
    config = tiny_config(model=model, training=training)
    kernels = Kernels(compiled=True)
    with compile_by(backend):
        loss, gradients = loss_and_gradients(config, kernels)
    assert kernels.compiled  # nothing fell back
    expected_loss, expected = loss_and_gradients(config, Kernels())
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        # fp32 sums of up to 1,000 numbers; a missing bias, mask or factor changes the first digits.
        assert (gradient - expected[key]).norm() <= 1e-5 * expected[key].norm(), key


def train_compiled(config: Config, steps: int) -> Any:
    with compile_by("aot_eager"):
        return train(config, steps)


def test_compiled_ranks_train_as_one_eager_process(ranks: Pool) -> None:
    """With sequence parallelism, split backwards, recomputation and dropout."""
    keys: Tree = {"model": {"resid_pdrop": 0.1}, "training": {"recompute": "full"}}
    expected = ranks.run(1, train, tiny_config(**keys), 2)
    keys["training"] = {"recompute": "full", "compile": True}
    keys["parallel"] = {"tensor": 2, "pipeline": 2, "schedule": "zbv", "sequence_parallel": True}
    compare(ranks.run(4, train_compiled, tiny_config(**keys), 2), expected)


def test_a_failed_compilation_is_reported_once_and_the_function_runs_eagerly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            raise kernels_module.compile_errors()[0]("no compiler\nat all")

        return run

    monkeypatch.setattr(kernels_module, "_compile", broken)
    kernels = Kernels(compiled=True)
    x = torch.ones(2, 3)
    for _ in range(2):
        assert kernels.run(kernels_module.column_sum, x).tolist() == [2, 2, 2]
    assert not kernels.compiled
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [
        "warning: training.compile: column_sum cannot be compiled, so the run continues without it, slower: no compiler"
    ]


def test_errors_of_the_function_itself_are_not_taken_for_failed_compilations() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("of the function")

    kernels = Kernels()
    with pytest.raises(ValueError, match="of the function"):
        kernels.run(fails, torch.ones(1))
