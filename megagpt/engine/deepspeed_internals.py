"""Everything that megagpt uses of DeepSpeed beyond its public interface. Written for DeepSpeed 0.19.

DeepSpeed reduces gradients after every backward, or once per step (`coalesce_grad_reduction`). megagpt reduces each chunk
of the model as soon as its last backward is done, and saves ZeRO's partitions in its own checkpoint format. Neither has a
public interface, so this module reads and drives parts of DeepSpeed's ZeRO optimizers. No other module does.
`check_internals` verifies at start that every part exists.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, Protocol, cast

import deepspeed
import torch
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from torch import Tensor, nn

from megagpt.distributed.launcher import Launcher
from megagpt.engine.flat_zero import FlatGroup, FlatZero, Update
from megagpt.errors import ConfigError
from megagpt.parallel.parameter import shard_of

ENGINE_ATTRIBUTES = ("_is_gradient_accumulation_boundary", "inside_no_sync_ctxt", "coalesce_grad_reduction")
OPTIMIZER_ATTRIBUTES = (
    "_coalesce_grad_reduction",
    "averaged_gradients",
    "dp_process_group",
    "optimizer",
    "overflow",
    "param_groups",
    "reset_cpu_buffers",
    "zero_grad",
)
"""Attributes of the ZeRO optimizer under every stage."""
STAGE_1_AND_2_ATTRIBUTES = (
    "_release_preflattened_grad_buffers",
    "all_grad_tensors",
    "_update_scale",
    "bit16_groups",
    "bit16_groups_flat",
    "clip_grad",
    "cpu_offload",
    "get_gradient_for_reduction",
    "micro_step_id",
    "model_parallel_rank",
    "mpu",
    "overlapping_partition_gradients_reduce_epilogue",
    "reduce_ipg_grads",
    "reduce_ready_partitions_and_remove_grads",
    "set_gradient_accumulation_boundary",
    "setup_buckets",
    "single_partition_of_fp32_groups",
)
STAGE_3_ATTRIBUTES = (
    "_partition_all_parameters",
    "_pre_step",
    "fp32_partitioned_groups_flat",
    "get_param_id",
    "grad_position",
    "offload_optimizer",
)
PARAMETER_ATTRIBUTES = ("_hp_mapping",)
STAGE_3_PARAMETER_ATTRIBUTES = ("ds_numel", "ds_shape", "ds_tensor", "partition_numel")

OPTIMIZER_STATES = {"adamw": ("exp_avg", "exp_avg_sq"), "adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""Names of the per-weight states of each optimizer type."""


def library_versions() -> dict[str, str]:
    """Return the versions that must be equal on all ranks."""
    return {"torch": torch.__version__, "deepspeed": deepspeed.__version__}


def init_deepspeed(launcher: Launcher, backend: str, timeout: timedelta) -> None:
    """Let DeepSpeed use the default process group, which must exist."""
    # DeepSpeed reads these variables itself, whichever launcher started the rank.
    os.environ["RANK"] = str(launcher.rank)
    os.environ["WORLD_SIZE"] = str(launcher.world_size)
    os.environ["LOCAL_RANK"] = str(launcher.local_rank)
    # It refuses another local rank of mpirun, which torchrun's ranks inherit if mpirun has started torchrun.
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
    # Its shared-memory operator is for inference only; refusing it saves a compilation and the need for a compiler. Nothing
    # else uses this table, which DeepSpeed would otherwise fill by running a compiler for each operator: 0.8 s.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19 calls collectives by the names that torch 2.13 replaced, in every step.
    warnings.filterwarnings("ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor)", FutureWarning)
    deepspeed.init_distributed(backend, timeout=timeout, dist_init_required=False, auto_mpi_discovery=False)


@contextmanager
def without_broadcast(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside the block, DeepSpeed does not send the weights of the first rank to the others, which have the same bits.

    It asks each weight whether it is a shard of DeepSpeed's own linear layers, which differ between ranks. Stage 3 still sends
    each weight when it divides it.
    """
    marked = [cast(Any, parameter) for parameter in parameters]
    for parameter in marked:
        parameter.ds_optim_param = True
    try:
        yield
    finally:
        for parameter in marked:
            del parameter.ds_optim_param


def mark_for_gradient_norm(parameters: Iterable[nn.Parameter], tp_size: int) -> None:
    """Set the attributes that DeepSpeed's gradient norm reads, so that it counts every weight once.

    `model_parallel`: a shard, counted on each tensor rank; parameters without it are counted on tensor rank 0 only.
    `ds_pipe_replicated`: a second copy, not counted.
    """
    for parameter in parameters:
        shard = shard_of(parameter)
        if shard.dim is not None and tp_size > 1:
            cast(Any, parameter).model_parallel = True
        if shard.second_copy:
            cast(Any, parameter).ds_pipe_replicated = True


def check_internals(engine: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Raise ConfigError if the installed DeepSpeed lacks an attribute that this module uses."""
    stage_3 = engine.zero_optimization_stage() == 3
    parameter = next(p for p in parameters if p.requires_grad)
    required = [(engine, name) for name in ENGINE_ATTRIBUTES]
    required += [(engine.optimizer, name) for name in OPTIMIZER_ATTRIBUTES]
    required += [(engine.optimizer, name) for name in (STAGE_3_ATTRIBUTES if stage_3 else STAGE_1_AND_2_ATTRIBUTES)]
    required += [(parameter, name) for name in (STAGE_3_PARAMETER_ATTRIBUTES if stage_3 else PARAMETER_ATTRIBUTES)]
    missing = [f"{type(owner).__name__}.{name}" for owner, name in required if not hasattr(owner, name)]
    if missing:
        raise ConfigError(
            f"deepspeed {deepspeed.__version__} has no {missing[0]}, which megagpt needs; "
            "install deepspeed 0.19 (see requirements.txt)"
        )


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO stage 3 has split the parameter over the data-parallel ranks."""
    return hasattr(parameter, "ds_tensor")


def local_size(parameter: nn.Parameter) -> int:
    """Return the number of values in this rank's shard of the model; ZeRO-3's own sharding does not count."""
    return int(cast(Any, parameter).ds_numel) if is_partitioned(parameter) else parameter.numel()


def local_weights(parameter: nn.Parameter) -> Tensor:
    """Return the weights that this rank stores: the parameter, or its partition under ZeRO stage 3."""
    return cast(Any, parameter).ds_tensor if is_partitioned(parameter) else parameter.detach()


class ZeroSteps(Protocol):
    """Gradients and optimizer step over the ZeRO ranks: `begin`, `reduce` any number of times, then `finish` or `cancel`.

    After `finish`: `update` or `discard`.
    """

    averages: bool
    """Whether gradients are averaged over the ranks, not summed."""

    def begin(self) -> None:
        """Keep gradients in `.grad` from here on; DeepSpeed's backward hooks do nothing."""

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Reduce these parameters, whose gradients are complete. Collective."""

    def finish(self) -> None:
        """Reduce the remaining parameters and hand all gradients to the optimizer. Collective."""

    def cancel(self) -> None:
        """End without reducing anything. The gradients must be None."""

    def update(self) -> Update:
        """Clip the gradients and update the weights, unless the gradients overflowed. Collective."""

    def discard(self) -> None:
        """Drop the reduced gradients. Weights and loss scale do not change."""

    def take_gathers(self, parameters: Iterable[nn.Parameter] | None = None) -> list[Any]:
        """Return the collectives in flight that bring updated weights, to be waited for; of all parameters if None."""


class _DeepSpeedUpdate:
    """The optimizer step by DeepSpeed."""

    averages = True

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def update(self) -> Update:
        """Clip the gradients and update the weights, unless the gradients overflowed. Collective."""
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        skipped = bool(getattr(self._engine.optimizer, "overflow", False))
        return Update(float("nan") if norm is None else float(norm), skipped)

    def take_gathers(self, parameters: Iterable[nn.Parameter] | None = None) -> list[Any]:
        """Return nothing: `update` has waited for all weights."""
        return []


class PartitionedSteps(_DeepSpeedUpdate):
    """Stage 3: one reduction at the end of the step, by DeepSpeed's own context manager."""

    def begin(self) -> None:
        """Keep gradients in `.grad` from here on; DeepSpeed's backward hooks do nothing."""
        self._context = self._engine.coalesce_grad_reduction()
        self._context.__enter__()

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Do nothing: `finish` reduces all parameters."""

    def finish(self) -> None:
        """Reduce all parameters. Collective."""
        self._context.__exit__(None, None, None)

    def cancel(self) -> None:
        """End without reducing anything: the context finds no gradients."""
        self._context.__exit__(None, None, None)

    def discard(self) -> None:
        """Drop the reduced gradients, as DeepSpeed does after an overflow."""
        zero = self._engine.optimizer
        zero.zero_grad(set_to_none=True)
        zero._pre_step()
        zero._partition_all_parameters()  # else later forwards would not see weights that a rollback loads
        if zero.offload_optimizer:
            zero.reset_cpu_buffers()
        else:
            zero.averaged_gradients = {}


class OffloadedSteps(_DeepSpeedUpdate):
    """Stages 1 and 2 with the optimizer on the CPU: reduce parameters as soon as their gradients are complete.

    Follows what `DeepSpeedEngine.coalesce_grad_reduction` does when it exits, for some of the parameters at a time.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._optimizer = engine.optimizer
        self._group = {p: index for index, group in enumerate(self._optimizer.bit16_groups) for p in group}
        self._pending: dict[nn.Parameter, None] = {}
        self._boundary_before: Any = None

    def begin(self) -> None:
        """Keep gradients in `.grad` from here on; DeepSpeed's backward hooks do nothing."""
        self._optimizer._coalesce_grad_reduction = True
        self._engine.inside_no_sync_ctxt = True
        # To DeepSpeed one optimizer step is one accumulation step, so every reduction is at the boundary.
        self._boundary_before = self._engine._is_gradient_accumulation_boundary
        self._engine._is_gradient_accumulation_boundary = True
        self._optimizer.set_gradient_accumulation_boundary(True)
        self._pending = dict.fromkeys(self._group)

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum these gradients over the shards; under stage 2 a rank frees the gradients that others own. Collective.

        All ranks of the group run the same plan, so they call this with the same parameters in the same order.
        """
        optimizer = self._optimizer
        optimizer._coalesce_grad_reduction = False
        optimizer.setup_buckets()
        for parameter in parameters:
            del self._pending[parameter]
            if optimizer.get_gradient_for_reduction(parameter) is not None:
                optimizer.reduce_ready_partitions_and_remove_grads(parameter, self._group[parameter])
        optimizer.reduce_ipg_grads()
        optimizer._coalesce_grad_reduction = True

    def finish(self) -> None:
        """Reduce the remaining parameters and hand all gradients to the optimizer. Collective."""
        self.reduce(list(self._pending))
        self._optimizer._coalesce_grad_reduction = False
        self._engine.inside_no_sync_ctxt = False
        self._optimizer.overlapping_partition_gradients_reduce_epilogue()
        self._engine._is_gradient_accumulation_boundary = self._boundary_before

    def cancel(self) -> None:
        """End without reducing anything."""
        self._optimizer._coalesce_grad_reduction = False
        self._engine.inside_no_sync_ctxt = False
        self._engine._is_gradient_accumulation_boundary = self._boundary_before

    def discard(self) -> None:
        """Drop the reduced gradients, as DeepSpeed does after an overflow."""
        zero = self._optimizer
        zero.zero_grad(set_to_none=True)
        zero.micro_step_id = INITIAL_MICRO_STEP_ID  # else offloaded gradients of the next step are added to these
        zero._release_preflattened_grad_buffers()
        zero.reset_cpu_buffers()


class FlatSteps:
    """Stages 1 and 2 (and 0, as stage 1 on one rank): DeepSpeed's flat weights and partitions, stepped by `FlatZero`."""

    averages = False

    def __init__(self, engine: Any, buckets: Sequence[Sequence[nn.Parameter]], rests: Sequence[Sequence[nn.Parameter]]) -> None:
        """`buckets`, `rests`: as `FlatZero` takes them."""
        self._zero = zero = engine.optimizer
        self._clip_grad = float(zero.clip_grad)
        engine.inside_no_sync_ctxt = True  # DeepSpeed's hooks do nothing from here on
        zero._coalesce_grad_reduction = True
        groups = zip(zero.bit16_groups, zero.bit16_groups_flat, zero.single_partition_of_fp32_groups, strict=True)
        parameters = [p for group in zero.bit16_groups for p in group]
        for parameter in parameters:  # placeholders, too
            parameter.grad_dtype = torch.float32
        self._flat = FlatZero(
            [FlatGroup(list(group), weights, master) for group, weights, master in groups],
            buckets,
            rests,
            zero.optimizer,
            zero.dp_process_group,
            zero.mpu.get_model_parallel_group(),
            self._is_counted,
            frees=engine.zero_optimization_stage() == 2,
        )
        self.begin, self.reduce, self.finish = self._flat.begin, self._flat.reduce, self._flat.finish
        self.take_gathers = self._flat.take_gathers

    def cancel(self) -> None:
        """End without reducing anything."""

    def update(self) -> Update:
        """Clip the gradients and update the weights, unless the gradients overflowed. Collective."""
        update = self._flat.update(float(self._zero.loss_scale), self._clip_grad)
        self._zero._update_scale(update.skipped)
        return update

    def discard(self) -> None:
        """Drop the gradients: the next `begin` sets them to zero."""

    def _is_counted(self, parameter: Any) -> bool:
        """Whether this rank counts the parameter in the gradient norm: see `mark_for_gradient_norm`."""
        if getattr(parameter, "ds_pipe_replicated", False):
            return False
        return getattr(parameter, "model_parallel", False) or self._zero.model_parallel_rank == 0


def build_zero_steps(
    engine: Any, buckets: Sequence[Sequence[nn.Parameter]], rests: Sequence[Sequence[nn.Parameter]]
) -> ZeroSteps:
    """Return gradients and optimizer step for the engine's ZeRO stage. `buckets`, `rests`: as `FlatZero` takes them."""
    if engine.zero_optimization_stage() == 3:
        return PartitionedSteps(engine)
    return OffloadedSteps(engine) if engine.optimizer.cpu_offload else FlatSteps(engine, buckets, rests)


@dataclass(frozen=True)
class ParameterPartition:
    """This rank's flat range [start, start + len(master)) of its tensor of a parameter."""

    parameter: nn.Parameter
    shape: tuple[int, ...]
    """Shape of the rank's full tensor (ZeRO-3 keeps the parameter itself empty)."""
    start: int
    master: Tensor
    """The fp32 weights that the optimizer updates; for a frozen parameter its own values, in its own dtype."""
    states: dict[str, Tensor]
    """Views of the optimizer states by name; empty for a frozen parameter."""


class _FlatRange(NamedTuple):
    """A parameter's range within this rank's flat fp32 partition of its group."""

    shape: tuple[int, ...]
    start: int
    flat: Tensor
    offset: int
    length: int


class ZeroState:
    """This rank's weights and optimizer states inside DeepSpeed's ZeRO (stages 1 to 3), parameter by parameter."""

    def __init__(self, engine: Any, parameters: list[nn.Parameter], optimizer_type: str, momentum: bool) -> None:
        self._zero = engine.optimizer
        self._stage = engine.zero_optimization_stage()
        self._inner = self._zero.optimizer
        self._parameters = parameters
        self._optimizer_type = optimizer_type
        self._momentum = momentum

    def partitions(self) -> Iterator[ParameterPartition]:
        """Yield this rank's partition of each parameter; parameters it has no part of are skipped."""
        for parameter in self._parameters:
            if not parameter.requires_grad:
                yield from self._frozen(parameter)
                continue
            entry = self._stage_3_range(parameter) if self._stage == 3 else self._stage_1_and_2_range(parameter)
            if entry is None:
                continue
            optimizer_state = self._state_of(entry.flat)
            names = self._state_names(entry.flat)
            states = {name: optimizer_state[name].narrow(0, entry.offset, entry.length) for name in names}
            master = entry.flat.detach().narrow(0, entry.offset, entry.length)
            yield ParameterPartition(parameter, entry.shape, entry.start, master, states)

    def set_weights(self, partition: ParameterPartition, values: Tensor) -> None:
        """Write fp32 values into the master weights; under ZeRO-3 also into the parameter's own partition."""
        partition.master.copy_(values)
        if self._stage == 3:
            local_weights(partition.parameter).data.narrow(0, 0, len(values)).copy_(values)

    @property
    def step(self) -> int:
        """Number of updates, which Adam's bias correction uses."""
        for state in self._inner.state.values():
            if "step" in state:
                return int(state["step"])
        return int(self._inner.param_groups[0].get("step", 0))

    @step.setter
    def step(self, value: int) -> None:
        for flat in self._flat_partitions():
            state = self._state_of(flat)
            if "step" in state:
                state["step"] = torch.tensor(float(value), device=state["step"].device)
        for group in self._inner.param_groups:
            if "step" in group:  # apex stores it per group
                group["step"] = value

    @property
    def loss_scaler(self) -> dict[str, float]:
        """State of the dynamic loss scale of fp16; empty for other precisions."""
        scaler = getattr(self._zero, "loss_scaler", None)
        return {key: value for key, value in vars(scaler).items() if type(value) in (int, float)} if scaler else {}

    @loss_scaler.setter
    def loss_scaler(self, values: dict[str, float]) -> None:
        for key, value in values.items():
            if hasattr(self._zero.loss_scaler, key):
                setattr(self._zero.loss_scaler, key, value)

    def flat_range(self, parameter: Any) -> tuple[int, int, int] | None:
        """Return where a parameter's range is, below stage 3: first value in the parameter, in the flat partition, length.

        None if this rank has no part of it.
        """
        entry = self._stage_1_and_2_range(parameter)
        return None if entry is None else (entry.start, entry.offset, entry.length)

    def _state_names(self, flat: Tensor) -> tuple[str, ...]:
        """Return the names of the states of a flat partition."""
        if self._optimizer_type == "sgd" and not self._momentum:
            return ()
        if self._optimizer_type != "muon":
            return OPTIMIZER_STATES[self._optimizer_type]
        number = next(number for number, other in enumerate(self._flat_partitions()) if other is flat)
        return OPTIMIZER_STATES["sgd" if self._inner.param_groups[number]["orthogonal"] else "adamw"]

    def _flat_partitions(self) -> list[Tensor]:
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _state_of(self, flat: Tensor) -> dict[str, Any]:
        """Return the optimizer's state of a flat partition; create zeros if no step has created it yet."""
        state = self._inner.state[flat]
        names = self._state_names(flat)
        for name in names:
            if state.get(name) is None:
                state[name] = torch.zeros_like(flat.detach())
        if "exp_avg" in names and "step" not in state and "step" not in self._inner.param_groups[0]:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        return state

    def _stage_1_and_2_range(self, parameter: Any) -> _FlatRange | None:
        """Read DeepSpeed's own map from the parameter to its range of this rank's flat partition."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        address = mapping.hp_fragment_address
        return _FlatRange(tuple(parameter.shape), mapping.lp_fragment_address.start, flat, address.start, address.numel)

    def _stage_3_range(self, parameter: Any) -> _FlatRange | None:
        """Stage 3 splits every parameter into equal ranges, of which the last one is padded."""
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start, length = self._stage_3_partition(parameter)
        flat = self._flat_partitions()[group]
        return _FlatRange(tuple(parameter.ds_shape), start, flat, offset, length) if length > 0 else None

    def _frozen(self, parameter: Any) -> Iterator[ParameterPartition]:
        """A frozen parameter is not in the optimizer: stage 3 partitions it, else the first data-parallel rank reports it."""
        if self._stage == 3:
            start, length = self._stage_3_partition(parameter)
            if length > 0:
                values = parameter.ds_tensor.narrow(0, 0, length)
                yield ParameterPartition(parameter, tuple(parameter.ds_shape), start, values, {})
        elif self._zero_rank == 0:
            yield ParameterPartition(parameter, tuple(parameter.shape), 0, parameter.detach().view(-1), {})

    def _stage_3_partition(self, parameter: Any) -> tuple[int, int]:
        """Return start and length of this rank's range; the length is 0 or less on the last ranks of a small parameter."""
        partition_length = parameter.partition_numel()
        start = partition_length * self._zero_rank
        return start, min(partition_length, parameter.ds_numel - start)

    @property
    def _zero_rank(self) -> int:
        return torch.distributed.get_rank(self._zero.dp_process_group)
