"""Run one rank's list of actions: compute, send, receive, deferred weight gradients. Works for every schedule."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megagpt.distributed.phase import PhaseTracker
from megagpt.parallel.deferred_gradients import DeferredGradients, GradientJob
from megagpt.parallel.topology import Topology
from megagpt.pipeline.transfers import Tensors, Transfers
from megagpt.schedules.plan import ActionKind, Plan, messages

PHASES = {
    ActionKind.FORWARD: "forward",
    ActionKind.BACKWARD: "backward",
    ActionKind.BACKWARD_INPUT: "input backward",
    ActionKind.BACKWARD_WEIGHT: "weight backward",
}


class Chunk(Protocol):
    """The module of one stage, as the executor uses it."""

    def __call__(self, x: Any, micro_batch: Any) -> Any:
        """Map hidden states to hidden states: a tensor, or a tuple of several.

        x is None on the first stage; the last stage returns the sum of the losses.
        """


class Reduction(Protocol):
    """What sums the weight gradients of the stages over the replicas."""

    def during_backward_of(self, stage: int) -> AbstractContextManager[None]:
        """Return a context for a forward whose backward is the last of its stage and completes all of its gradients."""

    def stage_done(self, stage: int) -> None:
        """Start the sums of a stage whose gradients are complete."""


@dataclass(frozen=True)
class Activations:
    """Input and output of one forward, saved for its backward."""

    inputs: Tensors
    """Empty on the first stage."""
    outputs: Tensors


class Executor:
    """Runs `plan` on this rank. Built once, used for every step with the same number and shape of micro-batches."""

    def __init__(
        self,
        plan: Plan,
        chunks: Mapping[int, Chunk],
        topology: Topology,
        deferred_gradients: DeferredGradients,
        likes: Sequence[Tensors],
        phase: PhaseTracker,
    ) -> None:
        """`chunks`: this rank's modules by stage.

        `likes`: shapes, dtype and device of what each stage hands to the next one, [batch, seq, hidden].
        """
        self.plan = plan
        self.chunks = chunks
        self.topology = topology
        self.deferred_gradients = deferred_gradients
        self.likes = likes
        self.phase = phase
        self.actions = plan.actions[topology.pp_rank]
        self.expected_messages = messages(plan, topology.pp_rank)
        last_action_of_stage = {action.stage: index for index, action in enumerate(self.actions)}
        self.last_actions = frozenset(last_action_of_stage.values())
        """Indices of the actions after which a stage has nothing left to do."""
        last = [self.actions[index] for index in self.last_actions]
        self.last_backwards = {(action.stage, action.micro_batch) for action in last if action.kind is ActionKind.BACKWARD}
        """(stage, micro-batch) of the backwards that complete all gradients of a stage."""

    def step(
        self,
        micro_batches: Sequence[Any],
        loss_gradient: Tensor | None,
        reduction: Reduction | None = None,
    ) -> Tensor | None:
        """Run the plan over the micro-batches of this data-parallel rank.

        `loss_gradient`: scalar gradient of the sum of the token losses, which each backward of the last stage starts from
        (loss scale / number of tokens for a mean loss); None for a plan without backwards.
        `reduction`: is informed when weight gradients are complete.
        Returns the sum of the token losses (fp32 scalar) on the last stage's rank, None on the others.
        Raises ValueError if the plan is for another number of micro-batches.
        """
        if len(micro_batches) != self.plan.n_micro_batches:
            raise ValueError(f"the plan is for {self.plan.n_micro_batches} micro-batches, not {len(micro_batches)}")
        return _Step(self, micro_batches, loss_gradient, reduction).run()


class _Step:
    """One execution of the plan: saved activations and pending work between the actions."""

    def __init__(
        self,
        executor: Executor,
        micro_batches: Sequence[Any],
        loss_gradient: Tensor | None,
        reduction: Reduction | None,
    ) -> None:
        self.executor = executor
        self.micro_batches = micro_batches
        self.loss_gradient = loss_gradient
        self.reduction = reduction
        self.ranks = executor.plan.rank_of_stage
        self.last_stage = executor.plan.n_stages - 1
        self.transfers = Transfers(executor.topology, executor.expected_messages, executor.likes, executor.phase)
        self.saved: dict[tuple[int, int], Activations] = {}
        self.deferred: dict[tuple[int, int], list[GradientJob]] = {}
        self.losses: list[Tensor] = []

    def run(self) -> Tensor | None:
        for index, action in enumerate(self.executor.actions):
            stage, micro_batch = action.stage, action.micro_batch
            self.executor.phase.enter(f"{PHASES[action.kind]} of stage {stage}, micro-batch {micro_batch}")
            match action.kind:
                case ActionKind.FORWARD:
                    self.forward(stage, micro_batch)
                case ActionKind.BACKWARD:
                    self.backward(stage, micro_batch)
                case ActionKind.BACKWARD_INPUT:
                    self.backward_input(stage, micro_batch)
                case ActionKind.BACKWARD_WEIGHT:
                    self.backward_weight(stage, micro_batch)
            if self.reduction is not None and index in self.executor.last_actions:
                self.reduction.stage_done(stage)
        self.transfers.finish()
        return torch.stack(self.losses).sum() if self.losses else None

    def watched(self, stage: int, micro_batch: int) -> AbstractContextManager[None]:
        """Return the context of a forward."""
        if self.reduction is None or (stage, micro_batch) not in self.executor.last_backwards:
            return nullcontext()
        return self.reduction.during_backward_of(stage)

    def forward(self, stage: int, micro_batch: int) -> None:
        inputs: Tensors = ()
        train = self.loss_gradient is not None
        if stage > 0:
            received = self.transfers.receive(ActionKind.FORWARD, stage, micro_batch, self.ranks[stage - 1])
            inputs = tuple(tensor.detach().requires_grad_(train) for tensor in received)
        x = inputs if len(inputs) > 1 else next(iter(inputs), None)
        with self.watched(stage, micro_batch):
            out = self.executor.chunks[stage](x, self.micro_batches[micro_batch])
        outputs = out if isinstance(out, tuple) else (out,)
        if train:
            self.saved[stage, micro_batch] = Activations(inputs, outputs)
        if stage == self.last_stage:
            self.losses.append(out.detach())
        else:
            message = tuple(tensor.detach() for tensor in outputs)
            self.transfers.send(ActionKind.FORWARD, stage + 1, micro_batch, message, self.ranks[stage + 1])

    def backward(self, stage: int, micro_batch: int) -> None:
        saved = self.saved.pop((stage, micro_batch))
        gradients: Sequence[Tensor | None] = [self.loss_gradient]
        if stage < self.last_stage:
            gradients = self.transfers.receive(ActionKind.BACKWARD, stage, micro_batch, self.ranks[stage + 1])
        torch.autograd.backward(saved.outputs, gradients)
        if saved.inputs:
            message = tuple(gradient for x in saved.inputs if (gradient := x.grad) is not None)
            assert len(message) == len(saved.inputs)
            self.transfers.send(ActionKind.BACKWARD, stage - 1, micro_batch, message, self.ranks[stage - 1])

    def backward_input(self, stage: int, micro_batch: int) -> None:
        with self.executor.deferred_gradients.deferring() as jobs:  # no longer referenced once they have run
            self.backward(stage, micro_batch)
        self.deferred[stage, micro_batch] = jobs

    def backward_weight(self, stage: int, micro_batch: int) -> None:
        with torch.no_grad():  # as inside a backward
            for job in self.deferred.pop((stage, micro_batch)):
                job()
