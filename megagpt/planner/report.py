"""A prediction as text and as a tree for JSON. Does not import torch."""

from typing import Any

from megagpt.config.schema import Config
from megagpt.planner.hardware import Hardware
from megagpt.planner.predict import Prediction
from megagpt.planner.search import SearchResult, reason

GIB = 2**30
AXES = {"tensor": "tensor", "context": "context", "dp_cp": "data", "pipeline": "pipeline", "embedding": "shared weights"}
"""Axis of the traffic -> its name in a report."""
MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "communication", "working")


def text_report(config: Config, hardware: Hardware, prediction: Prediction, tokens: int | None) -> str:
    """Return the report of a prediction. `tokens`: tokens of the run; None leaves out its length."""
    strategy, peak = prediction.strategy, prediction.peak
    lines = [
        f"cluster    {strategy.gpus:,} x {hardware.gpu.name}, {hardware.gpus_per_node} in a node; "
        f"{hardware.gpu.link:g} GB/s between GPUs, {hardware.network:g} GB/s between nodes",
        f"layout     {strategy}",
        f"model      {prediction.parameters:,} parameters; {peak.parameters:,} on the rank with the highest peak",
        f"memory     {size(peak.total)} of {size(prediction.memory_limit)} at the peak, on pipeline rank {prediction.peak_rank}"
        f"{'' if prediction.fits else '; DOES NOT FIT'}",
        "",
        *memory_table(prediction),
        "",
        f"FLOPs      {prediction.model_flops:.4g} per step, {prediction.hardware_flops:.4g} with recomputation",
        f"step       {duration(prediction.step_seconds)}; ranks wait for {prediction.bubble:.1%} of it on average (bubble)",
        *(f"             {name:32} {duration(value):>10}  {share:5.1%}" for name, value, share in time_parts(prediction)),
        f"speed      {prediction.tokens_per_second:,.0f} tokens/s, {prediction.tflops_per_gpu:.1f} TFLOP/s per GPU, "
        f"MFU {prediction.mfu:.1%}",
    ]
    if tokens is not None:
        hours = prediction.gpu_hours(tokens)
        lines.append(
            f"run        {tokens:,} tokens: {hours / strategy.gpus / 24:,.1f} days, {hours:,.0f} GPU-hours, "
            "without evaluation, checkpoints and failures"
        )
    return "\n".join([*lines, "", *traffic_table(prediction)])


def memory_table(prediction: Prediction) -> list[str]:
    """Return the memory of the pipeline ranks in GiB; neighbours that need the same are one line."""
    heads = ("weights", "gradients", "optimizer", "activations", "buffers", "working", "total")
    lines = ["rank       " + "".join(f"{head:>13}" for head in heads) + "   (GiB)"]
    for first, last in rank_ranges(prediction):
        memory = prediction.memory[first]
        name = f"{first}" if first == last else f"{first}-{last}"
        values = [getattr(memory, part) for part in MEMORY_PARTS] + [memory.total]
        lines.append(f"{name:<11}" + "".join(f"{value / GIB:13.2f}" for value in values))
    return lines


def rank_ranges(prediction: Prediction) -> list[tuple[int, int]]:
    """Return the first and last of each range of pipeline ranks with equal memory."""
    ranges: list[tuple[int, int]] = []
    for rank, memory in enumerate(prediction.memory):
        if ranges and prediction.memory[ranges[-1][0]] == memory:
            ranges[-1] = (ranges[-1][0], rank)
        else:
            ranges.append((rank, rank))
    return ranges


def time_parts(prediction: Prediction) -> list[tuple[str, float, float]]:
    """Return name, seconds and share of the parts of a step that take time."""
    parts = [(name, value, value / prediction.step_seconds) for name, value in prediction.parts.items()]
    return [part for part in parts if part[2] >= 5e-5]


def traffic_table(prediction: Prediction) -> list[str]:
    """Return the communication of the pipeline rank that communicates longest."""
    if not prediction.traffic:
        return ["no communication: one GPU"]
    lines = [f"{'communication of a rank and step':34}{'calls':>12}{'GB':>12}  link"]
    for (axis, kind), (calls, n_bytes) in sorted(prediction.traffic.items()):
        if axis in prediction.links:
            link = "network" if prediction.links[axis] else "node"
            lines.append(f"{AXES[axis] + ' ' + kind:34}{calls:12,.0f}{n_bytes / 1e9:12,.3f}  {link}")
    return lines


def ranking_table(result: SearchResult) -> list[str]:
    """Return the ranking of a search, and why the next ones are slower."""
    best = result.ranking[0]
    lines = [f"search     {result.tried:,} strategies, {result.fitting:,} fit; the fastest of each kind:"]
    for number, one in enumerate(result.ranking[:8], 1):
        lines.append(
            f"{number:>3}  {duration(one.step_seconds):>9}  MFU {one.mfu:5.1%}  {one.peak.total / GIB:5.1f} GiB  {one.strategy}"
        )
        if number > 1:
            slower = one.step_seconds / best.step_seconds - 1
            lines.append(f"{'':16}{slower:+.1%}: {reason(best, one)}")
    if result.too_large is not None and result.too_large_strategy is not None:
        too_much = (result.too_large.memory.total - best.memory_limit) / GIB
        lines.append(
            f"     faster by estimate ({duration(result.too_large.seconds)}), but {too_much:.1f} GiB too large: "
            f"{result.too_large_strategy}"
        )
    return lines


def tree(config: Config, hardware: Hardware, prediction: Prediction, tokens: int | None) -> dict[str, Any]:
    """Return the report as a tree of plain values; bytes, seconds and FLOPs without prefixes."""
    strategy = prediction.strategy
    hours = None if tokens is None else prediction.gpu_hours(tokens)
    return {
        "gpu": hardware.gpu.name,
        "gpus": strategy.gpus,
        "network_gb_per_second_per_node": hardware.network,
        "strategy": strategy_tree(prediction),
        "parameters": prediction.parameters,
        "fits": prediction.fits,
        "memory_limit_bytes": prediction.memory_limit,
        "peak_pipeline_rank": prediction.peak_rank,
        "memory_bytes_by_pipeline_rank": [
            {"parameters": memory.parameters, **{part: getattr(memory, part) for part in MEMORY_PARTS}, "total": memory.total}
            for memory in prediction.memory
        ],
        "model_flops_per_step": prediction.model_flops,
        "hardware_flops_per_step": prediction.hardware_flops,
        "step_seconds": prediction.step_seconds,
        "step_seconds_by_part": prediction.parts,
        "bubble": prediction.bubble,
        "tokens_per_step": prediction.tokens,
        "tokens_per_second": prediction.tokens_per_second,
        "tflops_per_gpu": prediction.tflops_per_gpu,
        "mfu": prediction.mfu,
        "tokens": tokens,
        "gpu_hours": hours,
        "days": None if hours is None else hours / strategy.gpus / 24,
        "communication_per_step": [
            {
                "axis": AXES[axis],
                "kind": kind,
                "calls": round(calls),
                "bytes": n_bytes,
                "link": "network" if prediction.links[axis] else "node",
            }
            for (axis, kind), (calls, n_bytes) in sorted(prediction.traffic.items())
            if axis in prediction.links
        ],
    }


def strategy_tree(prediction: Prediction) -> dict[str, Any]:
    """Return the keys of the strategy."""
    strategy = prediction.strategy
    keys = (
        "tensor",
        "pipeline",
        "context",
        "data",
        "schedule",
        "virtual_stages",
        "sequence_parallel",
        "zero_stage",
        "micro_batch",
        "micro_batches",
        "recompute",
        "recompute_layers",
    )
    return {key: getattr(strategy, key) for key in keys}


def ranking_tree(result: SearchResult) -> list[dict[str, Any]]:
    """Return the ranking of a search as plain values."""
    best = result.ranking[0]
    return [
        {
            "strategy": strategy_tree(one),
            "step_seconds": one.step_seconds,
            "mfu": one.mfu,
            "peak_bytes": one.peak.total,
            "slower_because": None if one is best else reason(best, one),
        }
        for one in result.ranking
    ]


def size(n_bytes: float) -> str:
    """Return bytes in GiB or MiB."""
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB else f"{n_bytes / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Return a time in s or ms."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
