"""What one rank of a run does in a step, counted in a dry run of the real modules: for `pretrain_gpt.py --dry-run`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from megagpt.config.schema import Config
from megagpt.parallel.topology import Layout
from megagpt.planner.dry_run import open_dry_run
from megagpt.planner.layers import LOSS_CHUNK_MIB
from megagpt.planner.step_simulation import Held, peak_held
from megagpt.planner.traffic import Traffic, count_traffic
from megagpt.schedules.registry import make_plan

GROUP_AXES = {
    "tensor": ("tensor",),
    "context": ("context",),
    "dp_cp": ("data", "context"),
    "model_parallel": ("pipeline", "tensor"),
    "pipeline": ("pipeline",),
}
"""Group of the traffic -> axes of the layout that it spans."""


@dataclass(frozen=True)
class RankReport:
    """Counts of one rank."""

    rank: int
    layout: Layout
    stages: dict[int, range]
    """Stage -> its layers."""
    parameters: int
    product_flops: int
    """FLOPs of matrix products in a step: forwards, backwards and what is recomputed."""
    attention_flops: int
    """FLOPs of fused attention in a step, each score counted, also those that the causal mask hides."""
    saved_bytes: dict[int, int]
    """Stage -> bytes that one micro-batch saves for its backward."""
    peak_saved_bytes: int
    """Largest sum of them in a step, with all micro-batches in flight."""
    traffic: Traffic

    def lines(self) -> list[str]:
        """Return the report as text."""
        layout, coordinates = self.layout, self.layout.coordinates(self.rank)
        place = ", ".join(f"{axis} {getattr(coordinates, axis)} of {getattr(layout, axis)}" for axis in coordinates._fields)
        lines = [f"rank         {self.rank:,} of {layout.world_size:,}: {place}"]
        for stage, layers in self.stages.items():
            saved = self.saved_bytes[stage] / 2**20
            lines.append(f"stage {stage:<6} layers {layers.start} to {layers.stop - 1}; a micro-batch saves {saved:,.1f} MiB")
        lines += [
            f"parameters   {self.parameters:,}",
            f"FLOPs        {self.product_flops:.6g} per step in matrix products, {self.attention_flops:.6g} in fused attention",
            f"activations  {self.peak_saved_bytes / 2**30:,.3f} GiB saved at the peak",
        ]
        if not self.traffic:
            return [*lines, "collectives  none"]
        lines.append(f"{'collectives of a step':24}{'ranks':>7}{'calls':>10}{'bytes':>20}")
        for key, amount in sorted(self.traffic.items()):
            lines.append(f"{key.group + ' ' + key.call:24}{self.group_size(key.group):7,}{amount.calls:10,}{amount.bytes:20,}")
        return lines

    def group_size(self, group: str) -> int:
        """Return the number of ranks in a group."""
        if group == "embedding":
            return 2
        return len(self.layout.ranks_along(self.rank, *GROUP_AXES[group]))


def report_rank(config: Config, layout: Layout, rank: int, compiled: bool) -> RankReport:
    """Run one training step's shapes through `rank`. No process group may exist; `parallel.schedule` must not be "auto".

    `compiled`: count what a GPU with compiled kernels saves.
    """
    parallel = config.parallel
    if compiled and config.training.loss_chunk_mib is None:  # fake tensors are on the CPU, where chunks are smaller
        training = config.training.model_copy(update={"loss_chunk_mib": float(LOSS_CHUNK_MIB[True])})
        config = config.model_copy(update={"training": training})
    n_micro_batches = config.training.global_batch_size // config.training.micro_batch_size // layout.data
    plan = make_plan(parallel.schedule, layout.pipeline, n_micro_batches, parallel.virtual_stages)
    with open_dry_run(config, layout, rank, compiled) as dry_run:
        counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
        with counter:
            traffic = count_traffic(dry_run, n_micro_batches)
        saved = {stage: dry_run.saved_bytes(stage) for stage in dry_run.chunks}
    held = [Held(saved.get(stage, 0), saved.get(stage, 0)) for stage in range(plan.n_stages)]
    attention, products = _flops(counter)
    return RankReport(
        rank,
        layout,
        {stage: dry_run.layers[stage] for stage in dry_run.chunks},
        dry_run.n_parameters,
        n_micro_batches * products,
        n_micro_batches * attention,
        saved,
        int(peak_held(plan.actions[layout.coordinates(rank).pipeline], held)),
        traffic,
    )


def _flops(counter: FlopCounterMode) -> tuple[int, int]:
    """Return the FLOPs of fused attention, and of matrix products, of one micro-batch."""
    counts = counter.get_flop_counts().get("Global", {})
    attention = sum(count for operator, count in counts.items() if operator in _ATTENTION)
    return attention, sum(counts.values()) - attention


def _attention(query: Any, key: Any, value: Any, *rest: Any, out_val: Any = None, **options: Any) -> int:
    batch, heads, length, size = query.shape
    return 4 * batch * heads * length * int(key.shape[-2]) * size


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, out_val: Any = None, **options: Any) -> int:
    return _attention(query, key, value) * 5 // 2


_attention._get_raw = True  # type: ignore[attr-defined]  # the counter passes tensors, not shapes
_attention_backward._get_raw = True  # type: ignore[attr-defined]
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Operators of fused attention on the CPU, which torch's counter does not know."""
