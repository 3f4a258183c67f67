"""Training steps of megagpt on one GPU beside Hugging Face's GPT-2 compiled by torch, with the same shape and batch.

megagpt's steps are those of its training loop (`Trainer.train_step`, batches from a memory-mapped corpus). Hugging Face's
are GPT2LMHeadModel under torch.compile with bf16 autocast, fused AdamW and clip_grad_norm_, on batches in GPU memory. Each
runs in a process of its own, alternating. MFU counts the FLOPs of megagpt's formula for both. The last lines are one table of
all runs, and the rate of large matrix products on this device.

  python benchmarks/gpu_step.py --shapes 124M 1.3B --steps 20 --rounds 2 --profile
  python benchmarks/gpu_step.py --shapes tiny --steps 3 --rounds 1      on a CPU: only shows that it runs
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "tiny": ({"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64, "vocab_size": 512}, 2, 4),
    "124M": ({"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}, 32, 128),
    "350M": ({"n_layer": 24, "n_embd": 1024, "n_head": 16, "n_positions": 1024, "vocab_size": 50257}, 16, 128),
    "1.3B": ({"n_layer": 24, "n_embd": 2048, "n_head": 16, "n_positions": 2048, "vocab_size": 50257}, 4, 16),
}
"""Model, micro-batch size and global batch size, in sequences."""
SIDES = ("megagpt", "hugging face")
WARM_UP = 5
"""First steps, which are not counted; the first one alone is reported."""
KINDS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma"),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "collectives": ("nccl",),
    "compiled": ("triton",),
    "optimizer": ("multi_tensor", "adam", "lpnorm"),
    "copies": ("memcpy", "memset", "copy"),
}
"""Kind of kernel -> parts of its name; the first match counts."""


def main() -> None:
    """Print a line for each run, and at the end a table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["124M"], help="shapes to measure")
    parser.add_argument("--steps", type=int, default=20, help=f"counted steps, after {WARM_UP} that are not counted")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, alternating")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="config keys of megagpt's side")
    parser.add_argument("--only", choices=SIDES, help="measure one side only")
    parser.add_argument("--profile", action="store_true", help="also print kernels by kind, launches and host-bound share")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[args.worker](args)))
        return
    rows = []
    for shape in args.shapes:
        for _ in range(args.rounds):
            for side in [args.only] if args.only else SIDES:
                result = _run(shape, side, args)
                print(_line(shape, side, result), flush=True)
                rows.append((shape, side, result))
    print(_table(rows))
    print(_matrix_rate())


def _table(rows: list[tuple[str, str, dict[str, Any]]]) -> str:
    """Return a Markdown table of all runs; with --profile also launches, host-bound share and time by kind of kernel."""
    profiled = any("profile" in result for *_, result in rows)
    names = ["shape", "side", "tokens/s", "ms/step", "MFU", "peak GiB", "first step s"]
    names += ["launches/step", "kernels ms", "host-bound", *KINDS, "other"] if profiled else []
    lines = [names, ["---"] * len(names)]
    for shape, side, result in rows:
        if "failed" in result:
            lines.append([shape, side, "failed", *[""] * (len(names) - 3)])
            continue
        cells = [shape, side, f"{result['tokens_per_second']:,.0f}", f"{result['step_ms']:.1f}", f"{result['mfu']:.1%}"]
        cells += [f"{result['peak_gib']:.2f}", f"{result['first_step_s']:.1f}"]
        if profiled:
            profile = result["profile"]
            cells += [f"{profile['launches']:,}", f"{profile['kernel_ms']:.1f}", f"{profile['idle']:.1%}"]
            cells += [f"{profile['kinds'].get(kind, 0):.1%}" for kind in (*KINDS, "other")]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _matrix_rate() -> str:
    """Measure products of square bf16 matrices, of 8192 rows on a GPU."""
    import torch

    cuda = torch.cuda.is_available()
    size, times, device = (8192, 50, "cuda") if cuda else (256, 5, "cpu")
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    _seconds(lambda: left @ right, times)  # warm-up
    rate = 2 * size**3 * times / _seconds(lambda: left @ right, times) / 1e12
    return f"{torch.cuda.get_device_name() if cuda else 'CPU'}: bf16 products of {size}^3 run at {rate:.3g} TFLOP/s"


def _seconds(function: Callable[[], Any], times: int) -> float:
    """Return the time of so many calls, until the device has done their work."""
    import torch

    def synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        function()
    synchronize()
    return time.perf_counter() - start


def _run(shape: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", side, "--shapes", shape, "--steps", str(args.steps)]
    command += ["--set", *args.set] if args.set else []
    command += ["--profile"] if args.profile else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.returncode}


def _line(shape: str, side: str, result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"{shape:5s} {side:13s} failed with exit code {result['failed']}"
    line = (
        f"{shape:5s} {side:13s} {result['tokens_per_second']:9,.0f} tokens/s | {result['step_ms']:8.1f} ms/step | "
        f"MFU {result['mfu']:5.1%} | peak {result['peak_gib']:5.2f} GiB | first step {result['first_step_s']:5.1f} s"
    )
    if "profile" in result:
        profile = result["profile"]
        kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in profile["kinds"].items())
        line += (
            f"\n      kernels {profile['kernel_ms']:.1f} ms of {profile['wall_ms']:.1f} ms per step "
            f"(device idle {profile['idle']:.1%}), {profile['launches']:,} launches per step; {kinds}"
        )
        line += "".join(f"\n      {ms:8.2f} ms x{count:5.0f}  {name}" for name, ms, count in profile["top"])
        line += "".join(f"\n      {ms:8.2f} ms idle before {name}" for name, ms in profile["idle_before"])
    return line


def _megagpt(args: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from megagpt.config import load_config
    from megagpt.data.blend import build_datasets
    from megagpt.data.indexed import IndexedWriter
    from megagpt.distributed.launcher import Launcher
    from megagpt.distributed.process_group import TIMEOUT, init_process_group
    from megagpt.engine.deepspeed_internals import init_deepspeed
    from megagpt.parallel.topology import Topology
    from megagpt.planner.flops import training_flops_per_token
    from megagpt.training.trainer import Trainer

    model, micro_batch_size, global_batch_size = SHAPES[args.shapes[0]]
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    init_process_group(Launcher(), device)
    init_deepspeed(Launcher(), "nccl" if device.type == "cuda" else "gloo", TIMEOUT)
    n_tokens = 2 * (args.steps + WARM_UP + 3) * global_batch_size * (model["n_positions"] + 1)
    with tempfile.TemporaryDirectory() as folder:
        with IndexedWriter(f"{folder}/random", np.dtype(np.uint16)) as writer:
            writer.add_documents(
                np.random.default_rng(0).integers(0, model["vocab_size"], n_tokens).astype(np.uint16), [n_tokens]
            )
        steps = args.steps + WARM_UP + 3
        tree = {
            "model": {**model, "activation": "gelu"},
            "data": {"train": f"{folder}/random"},
            "training": {
                "steps": steps,
                "micro_batch_size": micro_batch_size,
                "global_batch_size": global_batch_size,
                "precision": "bf16",
            },
        }
        path = Path(folder, "run.json")
        path.write_text(json.dumps(tree))
        config = load_config(path, args.set)
        trainer = Trainer(config, Topology(), build_datasets(config.data, config.model.n_positions), device)
        with trainer.batches() as batches:
            stream = iter(batches)
            result = _measure(lambda: trainer.train_step(next(stream), 1e-4), args, device)
    tokens_per_step = global_batch_size * model["n_positions"]
    return result | _rates(result["step_ms"], tokens_per_step, training_flops_per_token(config), device)


def _hugging_face(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from megagpt.config import build_config
    from megagpt.planner.flops import training_flops_per_token

    model, micro_batch_size, global_batch_size = SHAPES[args.shapes[0]]
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": None, "eos_token_id": None}
    network = GPT2LMHeadModel(GPT2Config(**model, **dropout, activation_function="gelu", use_cache=False)).to(device)
    compiled = torch.compile(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    shape = (micro_batch_size, model["n_positions"])
    tokens = torch.randint(0, model["vocab_size"], shape, device=device)
    n_micro_batches = global_batch_size // micro_batch_size

    def step() -> None:
        for _ in range(n_micro_batches):
            with torch.autocast(device.type, torch.bfloat16):
                loss = compiled(tokens, labels=tokens).loss / n_micro_batches
            loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    result = _measure(step, args, device)
    training = {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1}
    config = build_config({"model": model, "data": {"train": "none"}, "training": training})
    tokens_per_step = global_batch_size * model["n_positions"]
    return result | _rates(result["step_ms"], tokens_per_step, training_flops_per_token(config), device)


WORKERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"megagpt": _megagpt, "hugging face": _hugging_face}


def _measure(step: Callable[[], Any], args: argparse.Namespace, device: Any) -> dict[str, Any]:
    import torch

    first = _seconds(step, 1)
    _seconds(step, WARM_UP - 1)
    result: dict[str, Any] = {"first_step_s": first, "step_ms": _seconds(step, args.steps) / args.steps * 1e3}
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    if args.profile and device.type == "cuda":
        result["profile"] = _profile(step, 2)
    return result


def _profile(step: Callable[[], Any], n_steps: int) -> dict[str, Any]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        wall = _seconds(step, n_steps)
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    total = sum(event.self_device_time_total for event in events)
    kinds: Counter[str] = Counter()
    for event in events:
        name = event.key.lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
        kinds[kind] += event.self_device_time_total / total
    kernel_ms = total / 1e3 / n_steps
    largest = sorted(events, key=lambda event: -event.self_device_time_total)[:25]
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    intervals = [(event.name[:100], event.time_range.start, event.time_range.end) for event in on_device]
    return {
        "wall_ms": wall / n_steps * 1e3,
        "kernel_ms": kernel_ms,
        "idle": max(0.0, 1 - kernel_ms / (wall / n_steps * 1e3)),
        "launches": sum(event.count for event in events) // n_steps,
        "kinds": dict(kinds.most_common()),
        "idle_before": [(name, us / 1e3 / n_steps) for name, us in _idle_before(intervals)[:8]],
        "top": [(event.key[:100], event.self_device_time_total / 1e3 / n_steps, event.count / n_steps) for event in largest],
    }


def _idle_before(intervals: list[tuple[str, float, float]]) -> list[tuple[str, float]]:
    """Return the time in which nothing ran before the kernels of each name, longest first.

    intervals: name, start and end, in any order.
    """
    idle: dict[str, float] = defaultdict(float)
    busy_until = float("inf")
    for name, start, end in sorted(intervals, key=lambda interval: interval[1]):
        if start > busy_until:
            idle[name] += start - busy_until
        busy_until = end if busy_until == float("inf") else max(busy_until, end)
    return sorted(idle.items(), key=lambda entry: -entry[1])


def _rates(step_ms: float, tokens: int, flops_per_token: int, device: Any) -> dict[str, float]:
    from megagpt.training.throughput import peak_tflops

    rate = tokens / step_ms * 1e3
    peak = peak_tflops(device, "bf16")
    return {"tokens_per_second": rate, "mfu": rate * flops_per_token / (peak * 1e12) if peak else 0.0}


if __name__ == "__main__":
    main()
