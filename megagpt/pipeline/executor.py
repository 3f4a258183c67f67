"""Runs one rank's list of actions: compute, send, receive, deferred weight gradients. Any schedule, any number of stages."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megagpt.parallel.topology import Topology
from megagpt.parallel.weight_gradients import Job, WeightGradients
from megagpt.parallel.whereabouts import Whereabouts
from megagpt.pipeline.plan import Kind, Plan, messages
from megagpt.pipeline.transfers import Transfers

PHASES = {Kind.F: "forward", Kind.B: "backward", Kind.I: "backward for the input", Kind.W: "weight gradients"}


class Chunk(Protocol):
    """What the executor needs of a stage's module."""

    def __call__(self, x: Tensor | None, micro_batch: Any) -> Tensor:
        """Hidden states to hidden states; None in at the first stage, the sum of the token losses out at the last."""


class Executor:
    """Plays `plan` for this rank; made once, used for every step of that shape."""

    def __init__(
        self,
        plan: Plan,
        chunks: Mapping[int, Chunk],
        topology: Topology,
        weight_gradients: WeightGradients,
        like: Tensor,
        where: Whereabouts,
    ) -> None:
        """`chunks`: this rank's, by stage; `like`: shape, dtype and device of what stages exchange, [batch, seq, hidden];
        `where`: is told of every action."""
        self.plan, self.chunks, self.topology, self.weight_gradients, self.like = plan, chunks, topology, weight_gradients, like
        self.where = where
        self.actions = plan.actions[topology.at.pipeline]
        self.expected = messages(plan, topology.at.pipeline)
        self.last_of_stage = {action.stage: number for number, action in enumerate(self.actions)}.values()

    def step(
        self,
        micro_batches: Sequence[Any],
        loss_gradient: Tensor | None,
        stage_done: Callable[[int], None] | None = None,
    ) -> Tensor | None:
        """Run the plan over this data rank's micro-batches.

        `loss_gradient`: the scalar that each backward starts from (None where the plan has none: evaluation).
        `stage_done`: called with each stage of this rank once its weights have their whole gradients.
        Returns the sum of the token losses (fp32 scalar) on the last stage's rank, None elsewhere.
        """
        if len(micro_batches) != self.plan.n_micro_batches:
            raise ValueError(f"the plan is for {self.plan.n_micro_batches} micro-batches, not {len(micro_batches)}")
        return _Step(self, micro_batches, loss_gradient).run(stage_done)


class _Step:
    """One playing of the plan: what is under way between the actions."""

    def __init__(self, executor: Executor, micro_batches: Sequence[Any], loss_gradient: Tensor | None) -> None:
        self.executor, self.micro_batches, self.loss_gradient = executor, micro_batches, loss_gradient
        self.ranks, self.last_stage = executor.plan.rank_of_stage, executor.plan.n_stages - 1
        self.transfers = Transfers(executor.topology, executor.expected, executor.like, executor.where)
        self.saved: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self.parked: dict[tuple[int, int], list[Job]] = {}
        self.losses: list[Tensor] = []

    def run(self, stage_done: Callable[[int], None] | None) -> Tensor | None:
        for number, action in enumerate(self.executor.actions):
            stage, index = action.stage, action.micro_batch
            self.executor.where.at(f"{PHASES[action.kind]} of stage {stage}, micro-batch {index}")
            if action.kind is Kind.F:
                self.forward(stage, index)
            elif action.kind is Kind.B:
                self.backward(stage, index)
            elif action.kind is Kind.I:
                with self.executor.weight_gradients.parked() as jobs:
                    self.backward(stage, index)
                self.parked[stage, index] = jobs
            else:
                with torch.no_grad():  # as in a backward
                    for job in self.parked.pop((stage, index)):
                        job()
            if stage_done is not None and number in self.executor.last_of_stage:
                stage_done(stage)
        self.transfers.finish()
        return torch.stack(self.losses).sum() if self.losses else None

    def forward(self, stage: int, index: int) -> None:
        x, trains = None, self.loss_gradient is not None
        if stage > 0:
            x = self.transfers.take(Kind.F, stage, index, self.ranks[stage - 1]).detach().requires_grad_(trains)
        out = self.executor.chunks[stage](x, self.micro_batches[index])
        if trains:
            self.saved[stage, index] = (x, out)
        if stage == self.last_stage:
            self.losses.append(out.detach())
        else:
            self.transfers.give(Kind.F, stage + 1, index, out.detach(), self.ranks[stage + 1])

    def backward(self, stage: int, index: int) -> None:
        x, out = self.saved.pop((stage, index))
        gradient = self.loss_gradient
        if stage < self.last_stage:
            gradient = self.transfers.take(Kind.B, stage, index, self.ranks[stage + 1])
        torch.autograd.backward(out, gradient)
        if x is not None:
            assert x.grad is not None
            self.transfers.give(Kind.B, stage - 1, index, x.grad, self.ranks[stage - 1])
