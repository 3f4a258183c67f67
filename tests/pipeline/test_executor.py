"""The executor runs any plan: weight gradients may wait, nothing is computed twice, and each stage reports when it is done."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.phases import PhaseObserver
from support.pool import Pool
from support.products import MatrixProducts
from support.runs import Tree, count_labels, create_topology, local_micro_batches, parameters_by_name, tiny_config
from torch import Tensor, nn

from megagpt.config import Config
from megagpt.distributed.phase import PhaseTracker
from megagpt.model.chunk import build_chunk
from megagpt.model.forward_context import MicroBatch
from megagpt.model.meta_model import stage_layers
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.linear import linear
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.topology import Topology
from megagpt.pipeline.executor import Executor
from megagpt.schedules.plan import ActionKind, Plan, forward_plan, split_backward
from megagpt.schedules.registry import SCHEDULES, make_plan


def run_plans(config: Config) -> list[Tree]:
    """Return what this rank computes under 1F1B, and under 1F1B with every backward split in two."""
    topology = create_topology(config)
    batches = local_micro_batches(config, 0, topology)
    plan = make_plan("1f1b", topology.layout.pipeline, len(batches))
    return [run_plan(config, plan, topology, batches) for plan in (plan, split_backward(plan))]


def run_plan(config: Config, plan: Plan, topology: Topology, batches: list[MicroBatch]) -> Tree:
    """Return this rank's loss, gradients, shapes of weight matrices, and matrix products in one step."""
    deferred, (batch, seq) = DeferredGradients(), batches[0].tokens.shape
    parallel = ParallelContext.of(topology, config.parallel.sequence_parallel, deferred)
    layers = stage_layers(config, plan.n_stages)
    chunks = {stage: build_chunk(config, parallel, layers[stage]).train() for stage in plan.stages_of(topology.pp_rank)}
    executor = Executor(
        plan, chunks, topology, deferred, [(torch.empty(batch, seq, config.model.n_embd),)] * plan.n_stages, PhaseTracker()
    )
    with MatrixProducts() as products:
        loss = executor.step(batches, torch.tensor(1.0 / count_labels(config, 0)))
    parameters = parameters_by_name(nn.ModuleList(chunks.values()))
    return {
        "loss": None if loss is None else loss.item(),
        "gradients": {name: parameter.grad for name, parameter in parameters.items()},
        "matrices": [tuple(p.shape) for name, p in parameters.items() if name.startswith("layers.") and p.dim() == 2],
        "products": products.shapes,
    }


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_split_backward_gives_the_same_bits_with_as_many_products(recompute: str, ranks: Pool) -> None:
    config = tiny_config(
        parallel={"tensor": 2, "pipeline": 2},
        training={"recompute": recompute, "micro_batch_size": 1, "global_batch_size": 4},
    )
    micro_batches, layers_per_rank, tokens = 4, 2, 16
    results = ranks.run(4, run_plans, config)
    for full, split in results:
        assert split["loss"] == full["loss"]
        assert split["gradients"].keys() == full["gradients"].keys()
        assert all(torch.equal(gradient, full["gradients"][name]) for name, gradient in split["gradients"].items())
        assert sorted(split["products"]) == sorted(full["products"])
        # qkv, proj, up and down: each weight gradient once per micro-batch; no other product has these sizes.
        assert len(full["matrices"]) == layers_per_rank * 4
        weight_gradients = [(m, n) for m, k, n in split["products"] if k == tokens and (m, n) in full["matrices"]]
        assert len(weight_gradients) == micro_batches * layers_per_rank * 4
    assert [split["loss"] is None for _, split in results] == [True, True, False, False]


class Scale(nn.Module):
    """A stage that multiplies by a weight, whose gradient it defers. The last stage returns the sum of its output."""

    def __init__(self, factor: float, deferred: DeferredGradients, is_last: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[factor]]))
        self.parallel = ParallelContext(deferred_gradients=deferred)
        self.is_last = is_last
        self.grad_enabled: list[bool] = []

    def forward(self, x: Tensor | None, micro_batch: Any) -> Tensor:
        out = linear(micro_batch if x is None else x, self.weight, None, self.parallel)
        self.grad_enabled.append(out.requires_grad)
        return out.sum() if self.is_last else out


def stages(plan: Plan, deferred: DeferredGradients) -> dict[int, Scale]:
    return {stage: Scale(2.0 + stage, deferred, stage == plan.n_stages - 1) for stage in range(plan.n_stages)}


def single_process(plan: Plan) -> tuple[Executor, dict[int, Scale]]:
    """Return an executor of a plan for one rank, and its stages."""
    deferred = DeferredGradients()
    chunks = stages(plan, deferred)
    return Executor(plan, chunks, Topology(), deferred, [(torch.empty(1, 1, 1),)] * plan.n_stages, PhaseTracker()), chunks


@settings(deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 6))
def test_every_schedule_gives_the_gradients_of_a_plain_backward(name: str, micro_batches: int) -> None:
    plan = make_plan(name, 1, micro_batches, 3 if SCHEDULES[name].interleaved else 1)
    executor, chunks = single_process(plan)
    inputs = [torch.full((1, 1, 1), index + 1.0) for index in range(micro_batches)]
    loss = executor.step(inputs, torch.tensor(0.5))
    product = 1.0
    for chunk in chunks.values():
        product *= chunk.weight.item()
    total = sum(range(1, micro_batches + 1))
    assert loss is not None and loss.item() == total * product
    for chunk in chunks.values():
        assert chunk.weight.grad is not None
        assert chunk.weight.grad.item() == pytest.approx(0.5 * total * product / chunk.weight.item(), rel=1e-6)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_stage_is_reported_done_once_and_only_when_its_gradient_is_complete(name: str) -> None:
    plan = make_plan(name, 1, 4, 2 if SCHEDULES[name].interleaved else 1)
    executor, chunks = single_process(plan)
    reported: list[tuple[int, Tensor]] = []

    watched: list[int] = []

    class Recorder:
        @contextmanager
        def during_backward_of(self, stage: int) -> Iterator[None]:
            watched.append(stage)
            yield

        def stage_done(self, stage: int) -> None:
            gradient = chunks[stage].weight.grad
            assert gradient is not None
            reported.append((stage, gradient.clone()))

    executor.step([torch.ones(1, 1, 1)] * 4, torch.tensor(1.0), Recorder())
    assert sorted(stage for stage, _ in reported) == sorted(chunks)
    splits = any(action.kind is ActionKind.BACKWARD_WEIGHT for action in plan.actions[0])
    assert splits or sorted(watched) == sorted(chunks)  # each stage once
    assert all(torch.equal(gradient, chunks[stage].weight.grad) for stage, gradient in reported)


def test_an_evaluation_runs_forwards_only_and_leaves_no_gradient() -> None:
    executor, chunks = single_process(forward_plan((0, 0), 3))
    with torch.no_grad():
        loss = executor.step([torch.ones(1, 1, 1)] * 3, None)
    assert loss is not None and loss.item() == 3 * 2 * 3
    assert all(chunk.weight.grad is None and not any(chunk.grad_enabled) for chunk in chunks.values())


def test_another_number_of_micro_batches_than_the_plan_s_is_an_error() -> None:
    executor, _ = single_process(make_plan("1f1b", 1, 4))
    with pytest.raises(ValueError, match="the plan is for 4 micro-batches, not 3"):
        executor.step([torch.ones(1, 1, 1)] * 3, torch.tensor(1.0))


def test_the_phase_names_the_action_in_progress() -> None:
    plan = make_plan("zb_h1", 1, 1)
    assert [action.kind for action in plan.actions[0]] == [
        ActionKind.FORWARD,
        ActionKind.BACKWARD_INPUT,
        ActionKind.BACKWARD_WEIGHT,
    ]
    phase, names = PhaseObserver(), []
    phase.observe = names.append
    deferred = DeferredGradients()
    executor = Executor(plan, stages(plan, deferred), Topology(), deferred, [(torch.empty(1, 1, 1),)] * plan.n_stages, phase)
    executor.step([torch.ones(1, 1, 1)], torch.tensor(1.0))
    assert names == [
        "forward of stage 0, micro-batch 0",
        "input backward of stage 0, micro-batch 0",
        "weight backward of stage 0, micro-batch 0",
    ]
