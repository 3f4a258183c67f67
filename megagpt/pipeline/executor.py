"""Runs one rank's list of actions: compute, send, receive, deferred weight gradients. Any schedule, any number of stages."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megagpt.parallel.topology import Topology
from megagpt.parallel.weight_gradients import Job, WeightGradients
from megagpt.pipeline.schedule import Kind, Plan, messages
from megagpt.pipeline.transfers import Transfers


class Chunk(Protocol):
    """What the executor needs of a stage's module."""

    def __call__(self, x: Tensor | None, micro_batch: Any) -> Tensor:
        """Hidden states to hidden states; None in at the first stage, the sum of the token losses out at the last."""


class Executor:
    """Plays `plan` for this rank; made once, used for every step of that shape."""

    def __init__(
        self, plan: Plan, chunks: Mapping[int, Chunk], topology: Topology, weight_gradients: WeightGradients, like: Tensor
    ) -> None:
        """`chunks`: this rank's, by stage; `like`: shape, dtype and device of what stages exchange, [batch, seq, hidden]."""
        self.plan, self.chunks, self.topology, self.weight_gradients, self.like = plan, chunks, topology, weight_gradients, like
        self.actions = plan.actions[topology.at.pipeline]
        self.expected = messages(plan, topology.at.pipeline)
        self.last_stage = plan.n_stages - 1

    def step(self, micro_batches: Sequence[Any], loss_gradient: Tensor | None) -> Tensor | None:
        """Run the plan over this data rank's micro-batches.

        `loss_gradient`: the scalar that each backward starts from (None where the plan has none: evaluation).
        Returns the sum of the token losses (fp32 scalar) on the last stage's rank, None elsewhere.
        """
        if len(micro_batches) != self.plan.n_micro_batches:
            raise ValueError(f"the plan is for {self.plan.n_micro_batches} micro-batches, not {len(micro_batches)}")
        self._transfers = Transfers(self.topology, self.expected, self.like)
        self._saved: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self._parked: dict[tuple[int, int], list[Job]] = {}
        losses: list[Tensor] = []
        for action in self.actions:
            stage, index = action.stage, action.micro_batch
            if action.kind is Kind.F:
                self._forward(stage, index, micro_batches[index], losses, keep=loss_gradient is not None)
            elif action.kind is Kind.W:
                for job in self._parked.pop((stage, index)):
                    job()
            elif action.kind is Kind.I:
                with self.weight_gradients.parked() as jobs:
                    self._backward(stage, index, loss_gradient)
                self._parked[stage, index] = jobs
            else:
                self._backward(stage, index, loss_gradient)
        self._transfers.finish()
        return torch.stack(losses).sum() if losses else None

    def _forward(self, stage: int, index: int, micro_batch: Any, losses: list[Tensor], keep: bool) -> None:
        ranks = self.plan.rank_of_stage
        x = None
        if stage > 0:
            x = self._transfers.take(Kind.F, stage, index, ranks[stage - 1]).detach().requires_grad_(keep)
        out = self.chunks[stage](x, micro_batch)
        if keep:
            self._saved[stage, index] = (x, out)
        if stage == self.last_stage:
            losses.append(out.detach())
        else:
            self._transfers.give(Kind.F, stage + 1, index, out.detach(), ranks[stage + 1])

    def _backward(self, stage: int, index: int, loss_gradient: Tensor | None) -> None:
        ranks = self.plan.rank_of_stage
        x, out = self._saved.pop((stage, index))
        gradient = loss_gradient
        if stage < self.last_stage:
            gradient = self._transfers.take(Kind.B, stage, index, ranks[stage + 1])
        torch.autograd.backward(out, gradient)
        if x is not None:
            assert x.grad is not None
            self._transfers.give(Kind.B, stage - 1, index, x.grad, ranks[stage - 1])
