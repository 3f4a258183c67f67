"""One rank of a run of any size, executed without memory: fake tensors inside a fake process group.

The modules, the executor and the gradient reductions are the real ones, so what they send and what they save for the
backward is found by counting, not by formulas.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megagpt.config.schema import Config
from megagpt.distributed.phase import PhaseTracker
from megagpt.engine.gradient_sync import GradientSync
from megagpt.model.forward_context import MicroBatch
from megagpt.model.gpt import TOKEN_EMBEDDING, GPTChunk, activation_dtype, share_tied_embedding
from megagpt.model.meta_model import stage_layers
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.kernels import Kernels
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.topology import Layout, Topology
from megagpt.pipeline.executor import Executor
from megagpt.planner.fake_world import fake_world
from megagpt.schedules.registry import make_plan, placement

P = ParamSpec("P")
R = TypeVar("R")


class PlainKernels(Kernels):
    """Runs the functions that a GPU compiles as plain code, because fake tensors have no compiled code; they save the same."""

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return function(*args)."""
        return function(*args, **kwargs)


class DryRun:
    """One rank's chunks as fake tensors. Create it with `open_dry_run`."""

    def __init__(self, config: Config, layout: Layout, mode: FakeTensorMode, compiled: bool = False) -> None:
        parallel = config.parallel
        self.config = config
        self.topology = Topology.create(layout.tensor, layout.pipeline, context=layout.context)
        self.deferred_gradients = DeferredGradients()
        self.dtype = activation_dtype(config)
        self.rank_of_stage = placement(parallel.schedule, layout.pipeline, parallel.virtual_stages)
        kernels = PlainKernels(compiled)
        context = ParallelContext.of(self.topology, parallel.sequence_parallel, self.deferred_gradients, kernels)
        layers = stage_layers(config, len(self.rank_of_stage))
        self._mode = mode
        with mode, _default_dtype(self.dtype):
            self.chunks = {
                stage: GPTChunk(config, context, layers[stage])
                for stage, rank in enumerate(self.rank_of_stage)
                if rank == self.topology.pp_rank
            }
        share_tied_embedding(list(self.chunks.values()))
        self.parameters = list(dict.fromkeys(p for chunk in self.chunks.values() for p in chunk.parameters()))
        for parameter in self.parameters:
            parameter.grad_dtype = torch.float32

    @property
    def n_parameters(self) -> int:
        """Parameters of this rank, vocabulary padding and a second copy of the tied embedding included."""
        return sum(parameter.numel() for parameter in self.parameters)

    def forward_backward(self) -> None:
        """Run one micro-batch through this rank's stages."""
        parallel, layout = self.config.parallel, self.topology.layout
        plan = make_plan(parallel.schedule, layout.pipeline, 1, parallel.virtual_stages)
        with self._mode:
            executor = Executor(plan, self.chunks, self.topology, self.deferred_gradients, self._message(), PhaseTracker())
            executor.step([self._micro_batch()], torch.ones(()))

    def sum_gradients(self) -> None:
        """Sum the gradients that ZeRO does not sum, after `forward_backward`."""
        tied = TOKEN_EMBEDDING if self.config.model.tie_embeddings else None
        sync = GradientSync(self.chunks, self.rank_of_stage, self.topology, self.config.zero.stage, tied)
        with self._mode:
            for stage in self.chunks:
                sync.sum_stage(stage)
            sync.sum_tied()

    def saved_bytes(self, stage: int) -> int:
        """Return the bytes that the forward of one micro-batch on `stage` saves for its backward, weights excluded."""
        chunk = self.chunks[stage].train()
        weights = {_storage(parameter) for parameter in chunk.parameters()}
        saved: dict[int, Tensor] = {}

        def pack(tensor: Any) -> Any:
            if _storage(tensor) not in weights:
                saved[_storage(tensor)] = tensor
            return tensor

        with self._mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            x = None if chunk.is_first else self._message().requires_grad_()
            chunk(x, self._micro_batch())
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())

    def _micro_batch(self) -> MicroBatch:
        shape = (self.config.training.micro_batch_size, self.config.model.n_positions // self.topology.layout.context)
        tokens = torch.zeros(shape, dtype=torch.int64)
        return MicroBatch(tokens, tokens, samples=torch.zeros(shape[0], dtype=torch.int64))

    def _message(self) -> Tensor:
        """Return a tensor of the shape that stages exchange."""
        config, layout = self.config, self.topology.layout
        seq = config.model.n_positions // layout.context
        if config.parallel.sequence_parallel:
            seq //= layout.tensor
        return torch.empty(config.training.micro_batch_size, seq, config.model.n_embd, dtype=self.dtype)


@contextmanager
def open_dry_run(config: Config, layout: Layout, rank: int, compiled: bool = False) -> Iterator[DryRun]:
    """Yield a dry run of `rank`. No process group may exist. `parallel.schedule` must not be "auto".

    `compiled`: run the autograd functions that a GPU runs, which save less, with their compiled parts as plain code.
    """
    with fake_world(rank, layout.world_size):
        yield DryRun(config, layout, FakeTensorMode(allow_non_fake_inputs=True), compiled)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create floating-point tensors in `dtype`: fake parameters cannot be converted in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
