"""Column- and row-parallel linear layers equal torch.nn.Linear: output and every gradient, under every split.

The same sums in another order: relative 1e-12 of the largest value in float64, 2e-6 in fp32.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor, nn

from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import shard_of
from megagpt.parallel.topology import Topology

BATCH, SEQ, N_IN, N_OUT = 2, 8, 12, 16
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
LAYERS = (ColumnParallelLinear, RowParallelLinear)


class Reference:
    """torch.nn.Linear on the full tensors, with random weights and a random upstream gradient."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.layer = nn.Linear(N_IN, N_OUT, dtype=dtype)
        self.layer.weight.data = draw(N_OUT, N_IN)
        self.layer.bias.data = draw(N_OUT)
        self.x = draw(BATCH, SEQ, N_IN).requires_grad_()
        self.upstream = draw(BATCH, SEQ, N_OUT)
        self.out = self.layer(self.x)
        self.out.backward(self.upstream)


class Local:
    """A parallel layer with this rank's shards of the reference's weights, and this rank's input and upstream gradient."""

    def __init__(self, kind: type, reference: Reference, parallel: ParallelContext) -> None:
        self.kind = kind
        self.parallel = parallel
        self.layer: Any = kind("layer", N_IN, N_OUT, parallel, 0.1).to(reference.x.dtype)
        for parameter, full in ((self.layer.weight, reference.layer.weight), (self.layer.bias, reference.layer.bias)):
            parameter.data.copy_(self.shard(parameter, full))
        self.x = self.input_part(reference.x).detach().clone().requires_grad_()
        self.upstream = self.output_part(reference.upstream).clone()

    def shard(self, parameter: nn.Parameter, full: Tensor | None) -> Tensor:
        """Return this rank's shard of a full weight or gradient."""
        assert full is not None
        dim = shard_of(parameter).dim
        return full.detach() if dim is None else self.features(full.detach(), dim)

    def features(self, full: Tensor, dim: int) -> Tensor:
        return full.chunk(self.parallel.tp_size, dim)[self.parallel.tp_rank]

    def positions(self, full: Tensor) -> Tensor:
        return full.chunk(self.parallel.tp_size, 1)[self.parallel.tp_rank] if self.parallel.sequence_parallel else full

    def input_part(self, full: Tensor) -> Tensor:
        return self.positions(full) if self.kind is ColumnParallelLinear else self.features(full, 2)

    def output_part(self, full: Tensor) -> Tensor:
        return self.features(full, 2) if self.kind is ColumnParallelLinear else self.positions(full)

    def forward_backward(self) -> Tensor:
        out: Tensor = self.layer(self.x)
        out.backward(self.upstream)
        return out.detach()

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Return the gradient as the optimizer gets it: partial gradients are summed over the tensor ranks."""
        assert parameter.grad is not None
        gradient = parameter.grad.clone()
        if shard_of(parameter).partial_gradient:
            dist.all_reduce(gradient, group=self.parallel.tp_group)
        return gradient


def close(actual: Tensor, expected: Tensor | None) -> None:
    assert expected is not None
    limit = TOLERANCE[expected.dtype] * expected.detach().abs().max().item()
    torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=limit)


def parallel_context(tensor: int, sequence_parallel: bool) -> ParallelContext:
    return ParallelContext.of(Topology.create(tensor, 1), sequence_parallel, DeferredGradients())


def equals_nn_linear(tensor: int, sequence_parallel: bool) -> None:
    parallel = parallel_context(tensor, sequence_parallel)
    for kind in LAYERS:
        for dtype in TOLERANCE:
            reference = Reference(dtype)
            local = Local(kind, reference, parallel)
            weight, bias = local.layer.weight, local.layer.bias
            close(local.forward_backward(), local.output_part(reference.out))
            close(local.x.grad, local.input_part(reference.x.grad))
            close(local.gradient(weight), local.shard(weight, reference.layer.weight.grad))
            close(local.gradient(bias), local.shard(bias, reference.layer.bias.grad))
            local.forward_backward()  # gradients of micro-batches add up
            close(local.gradient(weight), 2 * local.shard(weight, reference.layer.weight.grad))
            close(local.gradient(bias), 2 * local.shard(bias, reference.layer.bias.grad))


LAYOUTS = pytest.mark.parametrize("tensor, sequence_parallel", [(1, False), (2, False), (2, True), (4, False), (4, True)])


@LAYOUTS
def test_output_and_all_gradients_equal_nn_linear(tensor: int, sequence_parallel: bool, ranks: Pool) -> None:
    ranks.run(tensor, equals_nn_linear, tensor, sequence_parallel)


def trains_only_what_is_not_frozen(tensor: int, sequence_parallel: bool) -> None:
    parallel = parallel_context(tensor, sequence_parallel)
    for kind in LAYERS:
        for frozen in ({"weight"}, {"bias"}, {"weight", "bias"}):
            reference = Reference(torch.float64)
            local = Local(kind, reference, parallel)
            for name in frozen:
                getattr(local.layer, name).requires_grad_(False)
            inputs = {local.x.untyped_storage().data_ptr()}
            saved: set[int] = set()

            def pack(tensor: Tensor, saved: set[int] = saved) -> Tensor:
                saved.add(tensor.untyped_storage().data_ptr())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                out = local.layer(local.x)
            out.backward(local.upstream)
            close(local.x.grad, local.input_part(reference.x.grad))
            assert bool(saved & inputs) == ("weight" not in frozen), "only the weight's gradient needs the input"
            for name in ("weight", "bias"):
                parameter = getattr(local.layer, name)
                if name in frozen:
                    assert parameter.grad is None
                else:
                    close(local.gradient(parameter), local.shard(parameter, getattr(reference.layer, name).grad))


@LAYOUTS
def test_a_frozen_weight_has_no_gradient_and_its_input_is_not_saved(tensor: int, sequence_parallel: bool, ranks: Pool) -> None:
    ranks.run(tensor, trains_only_what_is_not_frozen, tensor, sequence_parallel)


def defers_the_same_bits(tensor: int, sequence_parallel: bool) -> None:
    parallel = parallel_context(tensor, sequence_parallel)
    for kind in LAYERS:
        reference = Reference(torch.float32)
        now, later = Local(kind, reference, parallel), Local(kind, reference, parallel)
        jobs = []
        for _ in range(2):  # two micro-batches
            now.forward_backward()
            with parallel.deferred_gradients.deferring() as deferred:
                later.forward_backward()
            jobs += deferred
        assert torch.equal(now.x.grad, later.x.grad)
        assert len(jobs) == 2 and later.layer.weight.grad is None
        if kind is ColumnParallelLinear:
            assert later.layer.bias.grad is None
        with torch.no_grad():
            for job in jobs:
                job()
        assert torch.equal(now.layer.weight.grad, later.layer.weight.grad)
        assert torch.equal(now.layer.bias.grad, later.layer.bias.grad)


@LAYOUTS
def test_a_deferred_weight_gradient_has_the_same_bits_and_does_not_exist_before_its_job(
    tensor: int, sequence_parallel: bool, ranks: Pool
) -> None:
    ranks.run(tensor, defers_the_same_bits, tensor, sequence_parallel)


def test_gradients_of_bf16_weights_add_up_in_fp32_if_asked() -> None:
    layer = ColumnParallelLinear("layer", N_IN, N_OUT, ParallelContext(), 0.1).to(torch.bfloat16)
    for parameter in layer.parameters():
        parameter.data.fill_(1.0)
        parameter.grad_dtype = torch.float32
    for _ in range(3):
        layer(torch.full((1, 1, N_IN), 1.0, dtype=torch.bfloat16)).sum().backward()
    layer(torch.full((1, 1, N_IN), 2.0**-9, dtype=torch.bfloat16)).sum().backward()  # is lost in a bf16 sum of 3
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    assert torch.equal(layer.weight.grad, torch.full((N_OUT, N_IN), 3 + 2.0**-9))
    assert layer.bias.grad is not None and layer.bias.grad.dtype == torch.float32
    assert torch.equal(layer.bias.grad, torch.full((N_OUT,), 4.0))


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    layer = ColumnParallelLinear("layer", N_IN, N_OUT, ParallelContext(), 0.1)
    x = torch.ones(1, 2, N_IN)
    layer(x).sum().backward()
    assert x.grad is None
    assert torch.equal(layer.weight.grad, torch.full((N_OUT, N_IN), 2.0))


@pytest.mark.parametrize("kind", LAYERS)
def test_zero_3_s_replacement_of_torch_s_linear_is_not_used(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed replaces torch.nn.functional.linear in the entire process, by a function that rounds twice in bf16."""
    layer, x = kind("layer", N_IN, N_OUT, ParallelContext(), 0.1), torch.ones(1, 2, N_IN)
    for parameter in layer.parameters():
        parameter.data.fill_(0.5)
    expected = layer(x)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *arguments: torch.zeros(1, 2, N_OUT))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_flops_and_repr_are_those_of_the_unsharded_layer(kind: Any) -> None:
    layer = kind("layer", N_IN, N_OUT, ParallelContext(tp_rank=1, tp_size=4), 0.1)
    assert layer.flops_per_token() == 2 * N_IN * N_OUT
    assert repr(layer) == f"{kind.__name__}(in={N_IN}, out={N_OUT}, tensor ranks=4)"
