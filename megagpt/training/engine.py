"""One rank's model under DeepSpeed ZeRO, stepped by our schedule."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from megagpt.config.schema import Config, Schedule
from megagpt.errors import ConfigError
from megagpt.model.gpt import DTYPES, TOKEN_EMBEDDING, GPTChunk, MicroBatch, build_chunk, share_tied_embedding
from megagpt.parallel.context import ContextParallel
from megagpt.parallel.shard import TensorParallel, shard_of
from megagpt.parallel.topology import Topology
from megagpt.parallel.weight_gradients import WeightGradients
from megagpt.parallel.whereabouts import Whereabouts
from megagpt.pipeline.executor import Executor
from megagpt.pipeline.partition import stage_layers
from megagpt.pipeline.plan import forward_plan
from megagpt.pipeline.schedule import make_plan, placement
from megagpt.training.deepspeed_config import deepspeed_config
from megagpt.training.freezing import fill_groups, freeze
from megagpt.training.gradients import finish_gradients, sum_over_context, sum_over_ends
from megagpt.training.optimizer import build_optimizer
from megagpt.training.reduction import ByChunk, Reduction, WholeStep, refused
from megagpt.training.zero_groups import ZeroGroups

Look = Callable[[Sequence[MicroBatch]], None]
Judge = Callable[[Tensor | None], bool]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step left on this rank."""

    loss_sum: Tensor | None
    """Sum of this data rank's token losses, a scalar in fp32; None off the last stage."""
    grad_norm: float
    """L2 norm over all parameters of all ranks, before clipping."""
    loss_scale: float
    """fp16's scale of the gradients; 1 under the other precisions."""
    skipped: bool
    """Whether the gradients overflowed, or the update was refused, so that no weight changed."""


class Engine:
    """Chunks of the model, their ZeRO optimizer, and the executors of the plans they run."""

    def __init__(self, config: Config, topology: Topology, device: torch.device, where: Whereabouts | None = None) -> None:
        """`where`: is told of everything that the engine does."""
        self.config, self.topology, self.device = config, topology, device
        self.where = where or Whereabouts(device)
        self.weight_gradients = WeightGradients()
        tp = TensorParallel(
            self.weight_gradients,
            topology.tensor_group,
            topology.at.tensor,
            topology.layout.tensor,
            config.parallel.sequence_parallel,
            ContextParallel(topology.context_group, topology.context_rank, topology.layout.context),
        )
        parallel = config.parallel
        if parallel.schedule == "auto":
            raise ConfigError('parallel.schedule: "auto" must have been made a name (megagpt.planner.schedule)')
        self._schedule: Schedule = parallel.schedule
        self._placement = placement(self._schedule, topology.layout.pipeline, parallel.virtual_stages)
        layers = stage_layers(config.model, len(self._placement))
        mine = [stage for stage, rank in enumerate(self._placement) if rank == topology.at.pipeline]
        self.chunks: dict[int, GPTChunk] = {stage: build_chunk(config, tp, layers[stage], device) for stage in mine}
        share_tied_embedding(list(self.chunks.values()))
        freeze(self.chunks.values(), config)
        self.model = nn.ModuleList(self.chunks.values())
        self.parameters = list(self.model.parameters())
        fill_groups(self.model)
        self._executors: dict[tuple[Schedule | None, int, torch.Size], Executor] = {}
        self.tied = [p for p in self.parameters if config.model.tie_embeddings and shard_of(p).name == TOKEN_EMBEDDING]
        self._tied = [p for p in self.tied if p.requires_grad]
        self.deepspeed = self._initialize()
        self._reduction: Reduction = WholeStep(self.deepspeed) if config.zero.stage == 3 else ByChunk(self.deepspeed)

    def _initialize(self) -> Any:
        if self.config.training.precision == "fp16" and not get_accelerator().is_fp16_supported():
            raise ConfigError('training.precision: "fp16" is not supported on this device; "bf16" and "fp32" are')
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its notes are not the user's
        config, topology = self.config, self.topology
        engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=build_optimizer(config.optimizer, self.model.parameters()),
            mpu=ZeroGroups(topology, shards=config.zero.stage > 0),
            config=deepspeed_config(config, topology.layout.data),
        )
        for parameter in self.parameters:
            # Micro-batches add up in fp32. DeepSpeed's own switch for it (data_types.grad_accum_dtype) would swap its
            # optimizer for one that cannot leave the reduction to the end of the step.
            parameter.grad_dtype = torch.float32
        return engine

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        n_tokens: int,
        learning_rate: float,
        look: Look | None = None,
        judge: Judge | None = None,
    ) -> StepResult:
        """One optimizer step on this data rank's micro-batches.

        `n_tokens`: tokens with a label in the global batch, by whose number the loss is normalised whatever the split.
        `look`: called before the step's own work, where `backward_alone` may be used; it leaves no gradient behind.
        `judge`: called with the step's `loss_sum` before the update, which is made if it says so, on all ranks the same.
        """
        config, loss_scale = self.config, self.loss_scale
        # ZeRO averages over its shards what is to be summed.
        shards = self.topology.layout.data if config.zero.stage > 0 else 1
        gradient = torch.tensor(loss_scale * shards / max(1, n_tokens), dtype=torch.float32, device=self.device)
        self.model.train()
        self._reduction.begin()
        if look is not None:
            look(micro_batches)
        executor = self._executor(self._schedule, micro_batches)
        loss_sum = executor.step(micro_batches, gradient, self._reduce_stage)
        self.where.at("the last gradients over the data ranks")
        with self.where.waiting():
            self._reduce_tied()
            self._reduction.finish()
        made = judge is None or judge(loss_sum)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.where.at("the update")
        with self.where.waiting(), nullcontext() if made else refused(self.deepspeed.optimizer):
            self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        skipped = bool(getattr(self.deepspeed.optimizer, "overflow", False))
        return StepResult(loss_sum, float("nan") if norm is None else float(norm), loss_scale, skipped)

    def backward_alone(self, micro_batch: MicroBatch, n_tokens: int) -> None:
        """Leave the gradient of the mean loss of one micro-batch's `n_tokens`, times the loss scale, in each `.grad`.

        The ranks of a whole copy of the model make it together; data ranks that read other samples have their own.
        """
        gradient = torch.tensor(self.loss_scale / max(1, n_tokens), dtype=torch.float32, device=self.device)
        self._executor(self._schedule, [micro_batch]).step([micro_batch], gradient)
        self._sum_tied()
        finish_gradients(self.parameters, self.topology, over_data=False)
        sum_over_context(self.parameters, self.topology)

    def _reduce_stage(self, stage: int) -> None:
        """Sum a chunk's gradients as soon as they are whole, while others are at work; not those of a tied embedding."""
        tied = set(self._tied)
        done = [p for p in self.chunks[stage].parameters() if p.requires_grad and p not in tied]
        self.where.at(f"gradients of stage {stage} over the data ranks")
        with self.where.waiting():
            finish_gradients(done, self.topology, over_data=self.config.zero.stage == 0)
            self._reduction.reduce(done)

    def _sum_tied(self) -> None:
        """The tied embedding has a part of its gradient on each of two ranks, unless one has both ends of the model."""
        if self._placement[0] != self._placement[-1]:
            sum_over_ends(self._tied, self.topology)

    def _reduce_tied(self) -> None:
        """The tied embedding, to which the first stage and the last have each added."""
        self._sum_tied()
        finish_gradients(self._tied, self.topology, over_data=self.config.zero.stage == 0)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Tensor | None:
        """Sum of the token losses, without dropout or gradients; None off the last stage."""
        self.model.eval()
        return self._executor(None, micro_batches).step(micro_batches, None)

    @property
    def loss_scale(self) -> float:
        """fp16's scale of the gradients; 1 under the other precisions."""
        return float(self.deepspeed.optimizer.loss_scale) if self.config.training.precision == "fp16" else 1.0

    def close(self) -> None:
        """Free what DeepSpeed holds."""
        self.deepspeed.destroy()

    def _executor(self, schedule: Schedule | None, micro_batches: Sequence[MicroBatch]) -> Executor:
        """The executor of these micro-batches' plan, made at its first use; `schedule` None is for forwards alone."""
        key = (schedule, len(micro_batches), micro_batches[0].tokens.shape)
        if key not in self._executors:
            self._executors[key] = self._build_executor(*key)
        return self._executors[key]

    def _build_executor(self, schedule: Schedule | None, micro_batches: int, shape: torch.Size) -> Executor:
        parallel, (batch, seq) = self.config.parallel, shape
        if schedule is None:
            plan = forward_plan(self._placement, micro_batches)
        else:
            plan = make_plan(schedule, parallel.pipeline, micro_batches, parallel.virtual_stages)
        if self.config.parallel.sequence_parallel:
            seq //= self.topology.layout.tensor
        dtype = DTYPES[self.config.training.precision]
        like = torch.empty(batch, seq, self.config.model.n_embd, dtype=dtype, device=self.device)
        return Executor(plan, self.chunks, self.topology, self.weight_gradients, like, self.where)
