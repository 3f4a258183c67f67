"""The bubble of every schedule, measured: the real executor on stages that sleep, beside the simulator and the theory.

    python benchmarks/bubble.py --stages 4 --micro-batches 4 8 16 --milliseconds 20

Starts one process for each pipeline rank on this machine (gloo). A rank's forward, its backward for the input and its
weight gradients each sleep for the same time, shared by its chunks, so that cores do not matter. Idle is the time
from the first rank's start to the last one's end in which a rank does not sleep, as a share, the mean over ranks.
"""

import argparse
import os
import time
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megagpt.config.schema import Schedule
from megagpt.distributed.phase import PhaseTracker
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.topology import Topology
from megagpt.pipeline.executor import Executor
from megagpt.schedules.registry import INTERLEAVED, chunks_per_rank, make_plan
from megagpt.schedules.simulate import simulate

SCHEDULES: list[Schedule] = [name for name in get_args(Schedule) if name != "auto"]


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4, help="pipeline ranks")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--milliseconds", type=float, default=20.0, help="of each of F, I and W of a rank's layers")
    args = parser.parse_args()
    queue = mp.get_context("spawn").SimpleQueue()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577", "OMP_NUM_THREADS": "1"}
    mp.spawn(_rank, (args.stages, args.micro_batches, args.milliseconds / 1000, queue), nprocs=args.stages)
    print("| schedule | " + " | ".join(f"m = {m}: measured, simulated" for m in args.micro_batches) + " | theory |")
    print("| --- |" + " --- |" * (len(args.micro_batches) + 1))
    for name in SCHEDULES:
        found = [queue.get() for _ in args.micro_batches]
        assert all(item[0] == name for item in found)
        cells = [f"{measured:.1%}, {simulated:.1%}" for _, measured, simulated in found]
        print(f"| {name} | {' | '.join(cells)} | {theory(name, args.stages)} |")


def theory(name: Schedule, stages: int) -> str:
    """Idle time over busy time, where a paper gives it, for F = I = W."""
    bubble = stages - 1
    return {
        "1f1b": f"{bubble}/m of the busy time",
        "gpipe": f"{bubble}/m",
        "interleaved_1f1b": f"{bubble}/2m",
        "zb_h1": f"{bubble}/3m",
        "zbv": "0 for m >= 2p",
    }.get(name, "")


class SleepingChunk:
    """A stage whose forward, backward and weight gradient take `seconds` each."""

    def __init__(self, seconds: float, later: DeferredGradients) -> None:
        self.seconds, self.later = seconds, later

    def __call__(self, x: torch.Tensor | None, micro_batch: Any) -> torch.Tensor:
        start = torch.zeros(1, 1, 1, requires_grad=True) if x is None else x
        out = _Sleep.apply(start, self)
        return out.sum() if micro_batch == "last" else out


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, chunk: SleepingChunk) -> torch.Tensor:
        ctx.chunk = chunk
        time.sleep(chunk.seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        seconds = ctx.chunk.seconds
        time.sleep(seconds)
        ctx.chunk.later.add(lambda: time.sleep(seconds))
        return grads[0], None


def _rank(rank: int, stages: int, sizes: list[int], seconds: float, queue: Any) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=stages)
    topology = Topology.create(1, stages)
    for name in SCHEDULES:
        for micro_batches in sizes:
            idle = _measure(topology, name, micro_batches, seconds)
            if rank == 0:
                virtual = 2 if name in INTERLEAVED else 1
                simulation = simulate(make_plan(name, stages, micro_batches, virtual), in_order=False)
                queue.put((name, idle, sum(simulation.idle_share) / stages))
    dist.destroy_process_group()


def _measure(topology: Topology, name: Schedule, micro_batches: int, seconds: float) -> float:
    """The mean idle share of one run of the plan."""
    stages, virtual = topology.layout.pipeline, 2 if name in INTERLEAVED else 1
    plan, later, like = make_plan(name, stages, micro_batches, virtual), DeferredGradients(), torch.empty(1, 1, 1)
    part = seconds / chunks_per_rank(name, virtual)
    chunks = {stage: SleepingChunk(part, later) for stage in plan.stages_of(topology.pp_rank)}
    executor = Executor(plan, chunks, topology, later, like, PhaseTracker())
    executor.step(["any"] * micro_batches, torch.ones(1, 1, 1))  # opens the connections
    dist.barrier()
    start = time.time()
    executor.step(["any"] * micro_batches, torch.ones(1, 1, 1))
    times = torch.tensor([start, -time.time()], dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MIN)
    return 1 - 3 * seconds * micro_batches / float(-times[1] - times[0])


if __name__ == "__main__":
    main()
