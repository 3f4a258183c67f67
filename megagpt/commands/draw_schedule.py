"""tools/draw_schedule.py: draw the timeline of a pipeline schedule, or compare all schedules in a table."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from megagpt.commands import shell
from megagpt.errors import ConfigError
from megagpt.planner.schedule_costs import CostModel, even_costs
from megagpt.schedules.draw import draw
from megagpt.schedules.plan import Plan
from megagpt.schedules.registry import SCHEDULES, make_plan
from megagpt.schedules.simulate import Simulation, simulate

EXAMPLE = """examples:
  python tools/draw_schedule.py --schedule zbv --stages 4 --micro-batches 8 --output zbv.svg
  python tools/draw_schedule.py --schedule zb_h1 --stages 4 --micro-batches 8 --costs F=1,I=1.2,W=0.8
  python tools/draw_schedule.py --stages 4 --micro-batches 4 8 16"""
DEFAULT_VIRTUAL_STAGES = 2
"""Chunks per rank of the interleaved schedules."""


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("draw_schedule", __doc__, EXAMPLE)
    parser.add_argument("--schedule", choices=list(SCHEDULES), help="schedule to draw; if absent, print a table of all")
    parser.add_argument("--stages", type=int, required=True, help="number of pipeline ranks (parallel.pipeline)")
    parser.add_argument(
        "--micro-batches", type=int, nargs="+", required=True, help="micro-batches per step of one data-parallel rank"
    )
    parser.add_argument(
        "--virtual-stages", type=int, help=f"chunks per rank of the interleaved schedules ({DEFAULT_VIRTUAL_STAGES})"
    )
    parser.add_argument(
        "--costs",
        default="F=1,I=1,W=1",
        help="times of one micro-batch on the layers of one rank: forward, input gradient, weight gradients (%(default)s)",
    )
    parser.add_argument("--transfer", type=float, default=0.0, help="travel time of a message (%(default)s)")
    parser.add_argument("--output", help="picture to write, .svg")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return shell.run(_run, create_parser(), argv)


def _run(args: argparse.Namespace) -> None:
    if args.transfer < 0:
        raise ConfigError(f"--transfer {args.transfer}: expected 0 or more")
    if args.output is not None and not args.output.endswith(".svg"):
        raise ConfigError(f"--output {args.output}: pictures are SVG files; expected a name that ends in .svg")
    costs = even_costs(args.stages, *read_costs(args.costs))
    if args.schedule is None:
        if args.output is not None:
            raise ConfigError("--output: a picture shows one schedule; add --schedule")
        virtual_stages = args.virtual_stages or DEFAULT_VIRTUAL_STAGES
        print(comparison(args.stages, args.micro_batches, virtual_stages, costs, args.transfer))
        return
    if len(args.micro_batches) != 1:
        raise ConfigError(f"--micro-batches: {len(args.micro_batches)} numbers with --schedule, which takes one")
    micro_batches = args.micro_batches[0]
    virtual_stages = args.virtual_stages or (DEFAULT_VIRTUAL_STAGES if SCHEDULES[args.schedule].interleaved else 1)
    plan = _make_plan(args.schedule, args.stages, micro_batches, virtual_stages)
    simulation = simulate(plan, costs(plan.n_stages), args.transfer, in_order=False)
    sizes = f"{_count(args.stages, 'rank')}, {_count(micro_batches, 'micro-batch')}"
    title = f"{args.schedule}: {sizes}, {simulation.makespan:.4g} per step"
    if args.output is not None:  # before the table, so that an error is not below results
        _write(args.output, draw(plan, simulation, title))
    print(f"{title}\n{table_by_rank(plan, simulation)}")
    if args.output is not None:
        print(f"{args.output}: written")


def comparison(ranks: int, micro_batches: Sequence[int], virtual_stages: int, costs: CostModel, transfer: float) -> str:
    """Return a Markdown table of all schedules: idle share and micro-batches in flight, for each number of micro-batches.

    Both are the maximum over the ranks. Raises ConfigError if a plan cannot be built for these numbers.
    """
    heads = [f"{column}, {m} micro-batches" for column in ("idle", "in flight") for m in micro_batches]
    lines = [_table_row(["schedule", "chunks per rank", *heads]), _table_row(["---"] * (2 + len(heads)))]
    for name, schedule in SCHEDULES.items():
        plans = [_make_plan(name, ranks, m, virtual_stages if schedule.interleaved else 1) for m in micro_batches]
        simulations = [simulate(plan, costs(plan.n_stages), transfer, in_order=False) for plan in plans]
        chunks = plans[0].chunks_per_rank
        idle = [f"{max(simulation.idle_share):.1%}" for simulation in simulations]
        in_flight = [f"{max(simulation.peak_activations) / chunks:.3g}" for simulation in simulations]
        lines.append(_table_row([name, str(chunks), *idle, *in_flight]))
    return "\n".join(lines)


def table_by_rank(plan: Plan, simulation: Simulation) -> str:
    """Return a text table: each rank's idle share and its peak number of micro-batches in flight."""
    lines = ["rank    idle   in flight"]
    for rank, (idle, activations) in enumerate(zip(simulation.idle_share, simulation.peak_activations, strict=True)):
        lines.append(f"{rank:4d}  {idle:6.1%}  {activations / plan.chunks_per_rank:10.3g}")
    return "\n".join(lines)


def read_costs(text: str) -> tuple[float, float, float]:
    """Return the times of F, I and W in "F=1,I=1,W=1". Raises ConfigError for any other text, or if F is 0."""
    number = r"(\d+\.?\d*|\.\d+)"
    match = re.fullmatch(f"F={number},I={number},W={number}", text)
    if match is None or float(match[1]) == 0:
        raise ConfigError(f'--costs {text}: expected three times, F above 0, for example "F=1,I=1.2,W=0.8"')
    return float(match[1]), float(match[2]), float(match[3])


def _make_plan(name: str, ranks: int, micro_batches: int, virtual_stages: int) -> Plan:
    try:
        return make_plan(name, ranks, micro_batches, virtual_stages)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror}") from None


def _table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{plural if number != 1 else ''}"


if __name__ == "__main__":
    sys.exit(main())
