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
from megagpt.model.chunk import join_copies, message_tensors, new_chunk, shared_parameters
from megagpt.model.forward_context import MicroBatch
from megagpt.model.gpt import activation_dtype
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
        self.layers = stage_layers(config, len(self.rank_of_stage))
        self.shared = shared_parameters(config, self.layers)
        self._mode = mode
        with mode, _default_dtype(self.dtype):
            self.chunks = {
                stage: new_chunk(config, context, self.layers[stage])
                for stage, rank in enumerate(self.rank_of_stage)
                if rank == self.topology.pp_rank
            }
        join_copies(list(self.chunks.values()), self.shared)
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
            executor = Executor(plan, self.chunks, self.topology, self.deferred_gradients, self._messages(), PhaseTracker())
            executor.step([self._micro_batch()], torch.ones(()))

    def sum_gradients(self) -> None:
        """Sum the gradients that ZeRO does not sum, after `forward_backward`."""
        sync = GradientSync(self.chunks, self.rank_of_stage, self.topology, self.config.zero.stage, self.shared)
        with self._mode:
            for parameters in sync.by_stage.values():
                sync.sum(parameters)
            sync.sum_shared()

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
            received = () if chunk.is_first else [tensor.requires_grad_() for tensor in self._messages()[stage - 1]]
            chunk(tuple(received) if len(received) > 1 else next(iter(received), None), self._micro_batch())
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())

    def _micro_batch(self) -> MicroBatch:
        model, n_rows, context = self.config.model, self.config.training.micro_batch_size, self.topology.layout.context
        tokens = torch.zeros(n_rows, model.n_positions // context, dtype=torch.int64)
        samples = torch.zeros(n_rows, dtype=torch.int64)
        if not model.encoder_layers:
            return MicroBatch(tokens, tokens, samples=samples)
        source = torch.zeros(n_rows, model.source_length // context, dtype=torch.int64)
        return MicroBatch(tokens, tokens, samples=samples, source=source, source_lengths=samples + model.source_length)

    def _messages(self) -> list[tuple[Tensor, ...]]:
        """Return tensors of the shapes that each stage hands to the next one."""
        batch = self._micro_batch()
        n_source = 0 if batch.source is None else batch.source.shape[1]
        return message_tensors(self.config, self.layers, batch.tokens.shape, n_source)


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
