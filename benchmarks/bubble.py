"""Measure the bubble of every schedule: the real executor on stages that sleep, beside the simulation and the theory.

    python benchmarks/bubble.py --stages 4 --micro-batches 4 8 16 --milliseconds 20

Starts one process per pipeline rank on this machine (gloo). Forward, input backward and weight backward of a rank each
sleep for the same time, divided among its chunks, so the number of cores does not matter. The idle share is the part of
the time between the first rank's start and the last rank's end in which a rank does not sleep; mean over the ranks.
"""

import argparse
import os
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megagpt.distributed.phase import PhaseTracker
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.topology import Topology
from megagpt.pipeline.executor import Executor
from megagpt.schedules.plan import Plan
from megagpt.schedules.registry import SCHEDULES, make_plan
from megagpt.schedules.simulate import simulate


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4, help="pipeline ranks")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument(
        "--milliseconds", type=float, default=20.0, help="time of each of forward, input backward and weight backward of a rank"
    )
    args = parser.parse_args()
    queue = mp.get_context("spawn").SimpleQueue()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577", "OMP_NUM_THREADS": "1"}
    mp.spawn(_run_rank, (args.stages, args.micro_batches, args.milliseconds / 1000, queue), nprocs=args.stages)
    print("| schedule | " + " | ".join(f"m = {m}: measured, simulated" for m in args.micro_batches) + " | theory |")
    print("| --- |" + " --- |" * (len(args.micro_batches) + 1))
    for name in SCHEDULES:
        results = [queue.get() for _ in args.micro_batches]
        assert all(result[0] == name for result in results)
        cells = [f"{measured:.1%}, {simulated:.1%}" for _, measured, simulated in results]
        print(f"| {name} | {' | '.join(cells)} | {theory(name, args.stages)} |")


def theory(name: str, stages: int) -> str:
    """Return idle time over busy time if a paper gives it, for forward = input backward = weight backward."""
    bubble = stages - 1
    return {
        "1f1b": f"{bubble}/m of the busy time",
        "gpipe": f"{bubble}/m",
        "interleaved_1f1b": f"{bubble}/2m",
        "zb_h1": f"{bubble}/3m",
        "zbv": "0 for m >= 2p",
    }.get(name, "")


class SleepingChunk:
    """A stage whose forward, input backward and weight backward take `seconds` each."""

    def __init__(self, seconds: float, deferred_gradients: DeferredGradients) -> None:
        self.seconds = seconds
        self.deferred_gradients = deferred_gradients

    def __call__(self, x: torch.Tensor | None, micro_batch: Any) -> torch.Tensor:
        start = torch.zeros(1, 1, 1, requires_grad=True) if x is None else x
        return _Sleep.apply(start, self)


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
        ctx.chunk.deferred_gradients.add(lambda: time.sleep(seconds))
        return grads[0], None


def _run_rank(rank: int, stages: int, micro_batch_counts: list[int], seconds: float, queue: Any) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=stages)
    topology = Topology.create(1, stages)
    for name, schedule in SCHEDULES.items():
        for micro_batches in micro_batch_counts:
            plan = make_plan(name, stages, micro_batches, 2 if schedule.interleaved else 1)
            idle_share = _measure(topology, plan, seconds)
            if rank == 0:
                simulation = simulate(plan, in_order=False)
                queue.put((name, idle_share, sum(simulation.idle_share) / stages))
    dist.destroy_process_group()


def _measure(topology: Topology, plan: Plan, seconds: float) -> float:
    """Return the mean idle share of one run of the plan. Collective."""
    deferred = DeferredGradients()
    local_stages = plan.stages_of(topology.pp_rank)
    chunks = {stage: SleepingChunk(seconds / plan.chunks_per_rank, deferred) for stage in local_stages}
    executor = Executor(plan, chunks, topology, deferred, [(torch.empty(1, 1, 1),)] * plan.n_stages, PhaseTracker())
    micro_batches = [None] * plan.n_micro_batches
    executor.step(micro_batches, torch.ones(1, 1, 1))  # opens the connections
    dist.barrier()
    start = time.time()
    executor.step(micro_batches, torch.ones(1, 1, 1))
    times = torch.tensor([start, -time.time()], dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MIN)
    return 1 - 3 * seconds * plan.n_micro_batches / float(-times[1] - times[0])


if __name__ == "__main__":
    main()
