"""What a step needs, counted in dry runs of its pipeline ranks: for models that the closed formulas do not cover.

Memory, communication and FLOPs are those of the modules. There is no prediction of times.
"""

from dataclasses import dataclass
from typing import Any

from megagpt.config.schema import Config
from megagpt.parallel.topology import Layout
from megagpt.planner.dry_run_memory import memory_by_rank
from megagpt.planner.flops import training_flops_per_token
from megagpt.planner.hardware import Hardware
from megagpt.planner.memory import MemoryEstimate
from megagpt.planner.parameters import parameter_count
from megagpt.planner.report import AXES, GIB, MEMORY_PARTS, memory_table, size
from megagpt.planner.strategy import Strategy
from megagpt.planner.traffic import Traffic, step_traffic


@dataclass(frozen=True)
class Counted:
    """Memory, communication and FLOPs of a step."""

    strategy: Strategy
    memory: tuple[MemoryEstimate, ...]
    """Of each pipeline rank, without buffers and temporary tensors."""
    traffic: Traffic
    """Of the pipeline rank that moves most bytes."""
    parameters: int
    """Of the model, vocabulary padding excluded."""
    model_flops: int
    """FLOPs of a step on all GPUs, as MFU counts them."""

    @property
    def peak_rank(self) -> int:
        """Pipeline rank that needs the most memory."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)


def count_step(config: Config, strategy: Strategy) -> Counted:
    """Run a micro-batch of each pipeline rank without memory. No process group may exist; the schedule must not be "auto"."""
    layout = Layout(strategy.tensor, strategy.pipeline, strategy.context, strategy.data)
    by_rank = [step_traffic(config, layout, rank) for rank in layout.ranks_along(0, "pipeline")]
    tokens = config.training.global_batch_size * config.model.sample_tokens
    return Counted(
        strategy,
        tuple(memory_by_rank(config, strategy)),
        max(by_rank, key=lambda traffic: sum(amount.bytes for amount in traffic.values())),
        parameter_count(config),
        training_flops_per_token(config) * tokens,
    )


def counted_report(counted: Counted, hardware: Hardware) -> str:
    """Return the report as text."""
    peak = counted.memory[counted.peak_rank]
    lines = [
        f"layout     {counted.strategy}",
        f"model      {counted.parameters:,} parameters; {peak.parameters:,} on the rank with the highest peak",
        f"memory     {size(peak.total)} of {size(hardware.usable_bytes)} at the peak, on pipeline rank {counted.peak_rank}, "
        "without buffers and temporary tensors",
        "",
        *memory_table(counted),
        "",
        f"FLOPs      {counted.model_flops:.4g} per step",
        "step       no times are predicted for a model with an encoder",
        "",
        f"{'communication of a rank and step':34}{'calls':>12}{'GB':>12}",
        *(f"{axis + ' ' + kind:34}{calls:12,}{n_bytes / 1e9:12,.3f}" for axis, kind, calls, n_bytes in _named(counted.traffic)),
    ]
    return "\n".join(lines)


def counted_tree(counted: Counted, hardware: Hardware) -> dict[str, Any]:
    """Return the report as a tree of plain values, in bytes and FLOPs."""
    return {
        "gpu": hardware.gpu.name,
        "gpus": counted.strategy.gpus,
        "parameters": counted.parameters,
        "memory_limit_bytes": hardware.usable_bytes,
        "peak_pipeline_rank": counted.peak_rank,
        "memory_bytes_by_pipeline_rank": [
            {"parameters": memory.parameters, **{part: getattr(memory, part) for part in MEMORY_PARTS}, "total": memory.total}
            for memory in counted.memory
        ],
        "model_flops_per_step": counted.model_flops,
        "communication_per_step": [
            {"axis": axis, "kind": kind, "calls": calls, "bytes": n_bytes}
            for axis, kind, calls, n_bytes in _named(counted.traffic)
        ],
    }


def excess(counted: Counted, hardware: Hardware) -> str | None:
    """Return by how much the layout does not fit; None if it fits."""
    needed = counted.memory[counted.peak_rank].total
    if needed <= hardware.usable_bytes:
        return None
    return (
        f"the layout does not fit: pipeline rank {counted.peak_rank} needs {size(needed)}, "
        f"{(needed - hardware.usable_bytes) / GIB:.1f} GiB more than a run can use on {hardware.gpu.name}; use more tensor or "
        "pipeline ranks, a smaller training.micro_batch_size, or training.recompute full"
    )


def _named(traffic: Traffic) -> list[tuple[str, str, int, int]]:
    """Return axis, kind, calls and bytes of everything that is moved between ranks."""
    return [(AXES[key.group], key.call, *amount) for key, amount in sorted(traffic.items()) if key.group in AXES]
