"""A rank's part of the weights and moments inside DeepSpeed's ZeRO, as plain 1-D views by parameter.

The one place that knows how DeepSpeed 0.19 lays out its flat partitions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


@dataclass(frozen=True)
class Fragment:
    """The flat range [start, start + len(master)) of this rank's tensor of a parameter."""

    parameter: nn.Parameter
    shape: tuple[int, ...]
    """Of the rank's whole tensor (ZeRO-3 keeps the parameter itself empty)."""
    start: int
    master: Tensor
    """The fp32 values that are trained; of a frozen parameter its own, in its own type."""
    moments: dict[str, Tensor]
    """Views by kind; empty where the rule keeps none, and for a frozen parameter."""


class ZeroState:
    """The optimizer of a DeepSpeed engine, stage 1, 2 or 3, seen parameter by parameter."""

    def __init__(self, engine: Any, parameters: list[nn.Parameter], optimizer_type: str, momentum: bool) -> None:
        self._zero = engine.optimizer
        self._stage = engine.zero_optimization_stage()
        self._inner = self._zero.optimizer
        self._parameters = parameters
        self._kinds = MOMENTS[optimizer_type] if optimizer_type != "sgd" or momentum else ()

    def fragments(self) -> Iterator[Fragment]:
        """This rank's part of every parameter that it has a part of."""
        for parameter in self._parameters:
            if not parameter.requires_grad:
                yield from self._frozen(parameter)
                continue
            found = self._partitioned(parameter) if self._stage == 3 else self._mapped(parameter)
            if found is None:
                continue
            shape, start, flat, offset, length = found
            state = self._state_of(flat)
            moments = {kind: state[kind].narrow(0, offset, length) for kind in self._kinds}
            yield Fragment(parameter, shape, start, flat.detach().narrow(0, offset, length), moments)

    def set_weights(self, fragment: Fragment, master: Tensor) -> None:
        """Write fp32 values into the master copy; under ZeRO-3 into the parameter's own partition as well."""
        fragment.master.copy_(master)
        if self._stage == 3:
            partition = fragment.parameter.ds_tensor  # type: ignore[attr-defined]
            partition.data.narrow(0, 0, len(master)).copy_(master)

    @property
    def step(self) -> int:
        """Updates made: Adam's bias correction counts from it."""
        for state in self._inner.state.values():
            if "step" in state:
                return int(state["step"])
        return int(self._inner.param_groups[0].get("step", 0))

    @step.setter
    def step(self, value: int) -> None:
        for flat in self._flats():
            state = self._state_of(flat)
            if "step" in state:
                state["step"] = torch.tensor(float(value), device=state["step"].device)
        for group in self._inner.param_groups:
            if "step" in group:  # apex counts by group
                group["step"] = value

    @property
    def loss_scaler(self) -> dict[str, float]:
        """What fp16's dynamic loss scale depends on; empty under other precisions."""
        scaler = getattr(self._zero, "loss_scaler", None)
        return {key: value for key, value in vars(scaler).items() if type(value) in (int, float)} if scaler else {}

    @loss_scaler.setter
    def loss_scaler(self, values: dict[str, float]) -> None:
        for key, value in values.items():
            if hasattr(self._zero.loss_scaler, key):
                setattr(self._zero.loss_scaler, key, value)

    def _flats(self) -> list[Tensor]:
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _state_of(self, flat: Tensor) -> dict[str, Any]:
        """The rule's state of a flat partition, made as zeros where no step has made it yet."""
        state = self._inner.state[flat]
        for kind in self._kinds:
            if state.get(kind) is None:
                state[kind] = torch.zeros_like(flat.detach())
        if "exp_avg" in self._kinds and "step" not in state and "step" not in self._inner.param_groups[0]:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        return state

    def _mapped(self, parameter: nn.Parameter) -> tuple[tuple[int, ...], int, Tensor, int, int] | None:
        """Stages 1 and 2: DeepSpeed's own map from the parameter to its range of this rank's flat partition."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        address = mapping.hp_fragment_address
        return tuple(parameter.shape), mapping.lp_fragment_address.start, flat, address.start, address.numel

    def _partitioned(self, parameter: Any) -> tuple[tuple[int, ...], int, Tensor, int, int] | None:
        """Stage 3: equal parts of every parameter, the last one padded."""
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start, length = self._part(parameter)
        return (tuple(parameter.ds_shape), start, self._flats()[group], offset, length) if length > 0 else None

    def _frozen(self, parameter: Any) -> Iterator[Fragment]:
        """Not in the optimizer: whole on every data rank, of which the first tells it, or in parts as all under stage 3."""
        if self._stage == 3:
            start, length = self._part(parameter)
            if length > 0:
                yield Fragment(parameter, tuple(parameter.ds_shape), start, parameter.ds_tensor.narrow(0, 0, length), {})
        elif self._data_rank == 0:
            yield Fragment(parameter, tuple(parameter.shape), 0, parameter.detach().view(-1), {})

    def _part(self, parameter: Any) -> tuple[int, int]:
        """Start and length of this rank's flat part under stage 3; none is left for the last ranks of a small parameter."""
        part = parameter.partition_numel()
        start = part * self._data_rank
        return start, min(part, parameter.ds_numel - start)

    @property
    def _data_rank(self) -> int:
        return torch.distributed.get_rank(self._zero.dp_process_group)
