"""One rank's part of the model under DeepSpeed ZeRO, executed by a pipeline schedule.

A training step is `forward_backward`, then either `step` (update the weights) or `discard` (drop the gradients).
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from megagpt.checkpoint.boxes import boxes_of_range
from megagpt.config.schema import Config
from megagpt.distributed.phase import PhaseTracker
from megagpt.engine.deepspeed_check import check_section, explain_refusal
from megagpt.engine.deepspeed_config import deepspeed_config
from megagpt.engine.deepspeed_internals import (
    ZeroState,
    build_zero_steps,
    check_internals,
    mark_for_gradient_norm,
    without_broadcast,
)
from megagpt.engine.freezing import add_placeholder_parameters, check_scales, freeze
from megagpt.engine.gradient_sync import GradientSync, SharedParameter, sum_gradients, sum_partial_gradients
from megagpt.engine.mpu import DeepSpeedMPU
from megagpt.engine.muon import Muon, Segment
from megagpt.engine.optimizer import (
    build_optimizer,
    group_of,
    group_of_shard,
    groups_of_model,
    set_group,
    set_learning_rate,
    set_weight_decay,
)
from megagpt.engine.reduction import Bucket, ChunkReduction, make_buckets
from megagpt.errors import ConfigError
from megagpt.model.chunk import Chunk, build_chunk, join_copies, message_tensors, shared_parameters
from megagpt.model.forward_context import MicroBatch
from megagpt.model.meta_model import meta_model, stage_layers
from megagpt.model.objectives import Objective
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.kernels import Kernels
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import shard_of
from megagpt.parallel.products import Fp8Products, require_fp8
from megagpt.parallel.topology import Topology
from megagpt.pipeline.executor import Executor
from megagpt.schedules.plan import forward_plan
from megagpt.schedules.registry import make_plan, placement


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step on this rank."""

    grad_norm: float
    """L2 norm over all parameters of all ranks, before clipping; NaN if the gradients were discarded."""
    loss_scale: float
    """Scale of the gradients under fp16; 1 for other precisions."""
    skipped: bool
    """No weight changed: the gradients overflowed or were discarded."""


def compiles(config: Config, device_type: str) -> bool:
    """Whether the functions between matrix products are compiled on a device, "cuda" or "cpu"."""
    if config.training.compile == "auto":
        return device_type == "cuda" and config.zero.stage < 3
    return config.training.compile


def use_deterministic_algorithms() -> None:
    """Let this process use only CUDA kernels that give the same bits on every run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # for reads before writes


class Engine:
    """Chunks of the model, their ZeRO optimizer, and the executors that run them."""

    def __init__(self, config: Config, topology: Topology, device: torch.device, phase: PhaseTracker | None = None) -> None:
        """Build this rank's chunks and optimizer. Collective. `phase` is updated with everything that the engine does.

        Raises ConfigError if the device or the installed DeepSpeed cannot run the config.
        """
        self.config = config
        self.topology = topology
        self.device = device
        self.phase = phase or PhaseTracker(device)
        self.deferred_gradients = DeferredGradients()
        if config.training.deterministic and device.type == "cuda":
            use_deterministic_algorithms()
        parallel = config.parallel
        if parallel.schedule == "auto":
            raise ConfigError('parallel.schedule: "auto" must be resolved first (megagpt.planner.auto_schedule)')
        self._rank_of_stage = placement(parallel.schedule, topology.layout.pipeline, parallel.virtual_stages)
        full_model = meta_model(config)
        self._layers = stage_layers(config, len(self._rank_of_stage), full_model)
        self.chunks = self._build_chunks()
        self.model = nn.ModuleList(self.chunks.values())
        self._parameters = list(self.model.parameters())
        shared = shared_parameters(config, self._layers)
        self._sync = GradientSync(self.chunks, self._rank_of_stage, topology, config.zero.stage, shared)
        check_scales(config)
        for parameter in self._parameters:
            set_group(parameter, group_of_shard(shard_of(parameter), config))
        self._groups = groups_of_model(config, full_model)
        add_placeholder_parameters(self.model, self._groups)
        self.deepspeed = self._initialize_deepspeed()
        if config.optimizer.type == "muon":
            self._attach_matrices()
        build_steps = partial(build_zero_steps, self.deepspeed)
        self._reduction = ChunkReduction(self._sync, self.chunks, self._buckets(), build_steps, self.phase)
        self._zero = self._reduction.zero
        self._executors: dict[tuple[str | None, int, torch.Size, int], Executor] = {}

    def forward_backward(self, micro_batches: Sequence[MicroBatch], n_tokens: int | Tensor) -> Tensor | None:
        """Run all forwards and backwards of a step and reduce the gradients. Collective.

        `micro_batches`: this data-parallel rank's share of the global batch. `n_tokens`: unmasked tokens of the global
        batch; the loss is divided by it, however the batch is divided. A scalar tensor on the engine's device avoids a
        host synchronisation.
        Returns the sum of this rank's token losses (fp32 scalar) on the last stage, None on other stages.
        Call `step` or `discard` next.
        """
        # The sum over the shards is wanted.
        shards = self.topology.layout.dp_cp if self._zero.averages and self.config.zero.stage > 0 else 1
        self.model.train()
        self._zero.begin()
        executor = self._executor(self.config.parallel.schedule, micro_batches)
        loss_sum = executor.step(micro_batches, self._loss_gradient(n_tokens, self.loss_scale * shards), self._reduction)
        self.phase.enter("reduction of the last gradients")
        with self.phase.waiting():
            self._sync.sum_shared()
            self._zero.finish()
        return loss_sum

    def step(self, learning_rate: float) -> StepResult:
        """Clip the gradients and update the weights; skip the update if the gradients overflowed. Collective.

        Weights of other ranks may still be on their way; a forward waits for those that it reads.
        """
        self.phase.enter("optimizer step")
        loss_scale = self.loss_scale
        set_learning_rate(self.deepspeed.optimizer.param_groups, learning_rate)
        with self.phase.waiting():
            update = self._zero.update()
        return StepResult(update.grad_norm, loss_scale, update.skipped)

    def set_weight_decay(self, value: float) -> None:
        """Set the weight decay of the next steps."""
        set_weight_decay(self.deepspeed.optimizer.param_groups, value)

    def discard(self) -> StepResult:
        """Drop the gradients of `forward_backward` without an update. Weights and loss scale do not change."""
        self._zero.discard()
        return StepResult(float("nan"), self.loss_scale, skipped=True)

    @contextmanager
    def micro_batch_gradient(self, micro_batch: MicroBatch, n_tokens: int) -> Iterator[None]:
        """Inside the block, `.grad` holds d(mean loss) x loss scale of one micro-batch of `n_tokens` tokens. Collective.

        The ranks of one replica compute it together; other data-parallel ranks have gradients of their own. The gradients
        are dropped at the end of the block.
        """
        self.model.train()
        self._zero.begin()
        executor = self._executor(self.config.parallel.schedule, [micro_batch])
        executor.step([micro_batch], self._loss_gradient(n_tokens, self.loss_scale))
        self._sync.sum_over_stages()
        sum_partial_gradients(self._parameters, self.topology.tensor_group)
        sum_gradients(self._parameters, self.topology.context_group)
        yield
        for parameter in self._parameters:
            parameter.grad = None
        self._zero.cancel()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Tensor | None:
        """Return the sum of the token losses without dropout or gradients; None except on the last stage. Collective."""
        self.model.eval()
        return self._executor(None, micro_batches).step(micro_batches, None)

    @contextmanager
    def computing(self, objective: Objective) -> Iterator[None]:
        """Inside the block, the last chunk computes `objective` from its hidden states instead of the loss."""
        last = [chunk for chunk in self.chunks.values() if chunk.is_last]
        usual = [chunk.objective for chunk in last]
        for chunk in last:
            chunk.objective = objective
        try:
            yield
        finally:
            for chunk, own in zip(last, usual, strict=True):
                chunk.objective = own

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of this rank, with the weights of the last step. Collective."""
        self._reduction.wait_for_weights()
        return self._parameters

    @property
    def shared(self) -> list[SharedParameter]:
        """The parameters of this rank that several stages share, such as a tied embedding."""
        return self._sync.shared

    @property
    def last_stage_rank(self) -> int:
        """Pipeline rank of the last stage."""
        return self._rank_of_stage[-1]

    @property
    def loss_scale(self) -> float:
        """Scale of the gradients under fp16; 1 for other precisions."""
        return float(self.deepspeed.optimizer.loss_scale) if self.config.training.precision == "fp16" else 1.0

    @property
    def compiles(self) -> bool:
        """Whether the functions between matrix products are compiled."""
        return compiles(self.config, self.device.type)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that updates this rank's part of the weights."""
        optimizer: torch.optim.Optimizer = self.deepspeed.optimizer.optimizer
        return optimizer

    def zero_state(self) -> ZeroState:
        """Return the weights and optimizer states that this rank owns. Collective."""
        self._reduction.wait_for_weights()
        return self._zero_state()

    def close(self) -> None:
        """Free DeepSpeed's resources. Collective."""
        self._reduction.wait_for_weights()
        self.deepspeed.destroy()

    def _build_chunks(self) -> dict[int, Chunk]:
        """Build this rank's chunks, by stage."""
        topology, config = self.topology, self.config
        kernels, products = Kernels(compiled=self.compiles), None
        if config.training.precision == "fp8":
            require_fp8(self.device)
            products = Fp8Products(kernels)
        parallel = ParallelContext.of(topology, config.parallel.sequence_parallel, self.deferred_gradients, kernels, products)
        local_stages = [stage for stage, rank in enumerate(self._rank_of_stage) if rank == topology.pp_rank]
        chunks = {stage: build_chunk(config, parallel, self._layers[stage], self.device) for stage in local_stages}
        join_copies(list(chunks.values()), shared_parameters(config, self._layers))
        freeze(chunks.values(), config)
        return chunks

    def _initialize_deepspeed(self) -> Any:
        config, topology = self.config, self.topology
        if config.training.precision == "fp16" and not get_accelerator().is_fp16_supported():
            raise ConfigError('training.precision: "fp16" is not supported on this device; "bf16" and "fp32" are')
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its notes are not for the user
        check_section(config, topology.layout.dp_cp)
        mark_for_gradient_norm(self._parameters, topology.layout.tensor)
        optimizer = build_optimizer(config.optimizer, self.model.parameters())
        try:
            with without_broadcast(self.model.parameters()):
                engine, *_ = deepspeed.initialize(
                    model=self.model,
                    optimizer=optimizer,
                    mpu=DeepSpeedMPU(topology, shard=config.zero.stage > 0),
                    config=deepspeed_config(config, topology.layout.dp_cp),
                )
        except (AssertionError, AttributeError, ImportError, TypeError, ValueError) as error:
            raise explain_refusal(config, error) from error
        check_internals(engine, self.model.parameters())  # with the placeholders, so at least one is trained
        for parameter in self._parameters:
            # Micro-batches accumulate in fp32. DeepSpeed's own option for this (data_types.grad_accum_dtype) would use
            # an optimizer that cannot leave the reduction to the end of the step.
            parameter.grad_dtype = torch.float32
        return engine

    def _attach_matrices(self) -> None:
        """Give Muon the list of the pieces of matrices that this rank has."""
        zero, topology = self._zero_state(), self.topology
        shards = topology.dp_cp_group if self.config.zero.stage > 0 else None
        for group, description in zip(self.deepspeed.optimizer.param_groups, self._groups, strict=True):
            segments = []
            for parameter in self._parameters:
                if not parameter.requires_grad or not description.orthogonal or group_of(parameter) != description:
                    continue
                shard, found = shard_of(parameter), zero.flat_range(parameter)
                start, offset, length = found or (0, 0, 0)
                pieces = boxes_of_range(shard, tuple(parameter.shape), start, start + length)
                split = topology.tensor_group if shard.dim is not None else None
                groups = tuple(one for one in (shards, split) if one is not None)
                segments.append(Segment(shard, pieces, offset, groups))
            Muon.attach(group, segments)

    def _zero_state(self) -> ZeroState:
        optimizer = self.config.optimizer
        return ZeroState(self.deepspeed, self._parameters, optimizer.type, optimizer.momentum > 0)

    def _loss_gradient(self, n_tokens: int | Tensor, scale: float) -> Tensor:
        """Return scale / n_tokens: the gradient of the sum of the token losses, an fp32 scalar on the device."""
        if isinstance(n_tokens, Tensor):
            return (scale / n_tokens.clamp(min=1)).to(torch.float32)
        return torch.tensor(scale / max(1, n_tokens), dtype=torch.float32, device=self.device)

    def _buckets(self) -> dict[int, list[Bucket]]:
        """Return the buckets of each stage; none where the gradients of a stage are not summed in parts."""
        zero, by_stage = self.config.zero, self._sync.by_stage
        if self.topology.layout.dp_cp == 1 or zero.stage not in (1, 2) or zero.offload_optimizer != "none":
            return {stage: [] for stage in by_stage}
        n_bytes = zero.reduce_bucket_mib * 2**20
        return {stage: make_buckets(self.chunks[stage].blocks, trained, n_bytes) for stage, trained in by_stage.items()}

    def _executor(self, schedule: str | None, micro_batches: Sequence[MicroBatch]) -> Executor:
        """Return the executor for these micro-batches, built on first use. Schedule None runs forwards only."""
        batch, source = micro_batches[0], micro_batches[0].source
        key = (schedule, len(micro_batches), batch.tokens.shape, 0 if source is None else source.shape[1])
        if key not in self._executors:
            self._executors[key] = self._build_executor(*key)
        return self._executors[key]

    def _build_executor(self, schedule: str | None, n_micro_batches: int, shape: torch.Size, n_source: int) -> Executor:
        parallel = self.config.parallel
        if schedule is None:
            plan = forward_plan(self._rank_of_stage, n_micro_batches)
        else:
            plan = make_plan(schedule, parallel.pipeline, n_micro_batches, parallel.virtual_stages)
        likes = message_tensors(self.config, self._layers, shape, n_source, self.device)
        return Executor(plan, self.chunks, self.topology, self.deferred_gradients, likes, self.phase)
