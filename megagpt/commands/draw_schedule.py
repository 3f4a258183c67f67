"""tools/draw_schedule.py: a pipeline schedule's timeline as a picture, or all schedules compared in a table."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megagpt.commands import shell
from megagpt.config.schema import Schedule
from megagpt.errors import ConfigError
from megagpt.pipeline.costs import CostModel, even_costs
from megagpt.pipeline.picture import draw
from megagpt.pipeline.plan import Plan
from megagpt.pipeline.schedule import INTERLEAVED, make_plan
from megagpt.pipeline.simulate import Simulation, simulate

EXAMPLE = """examples:
  python tools/draw_schedule.py --schedule zbv --stages 4 --micro-batches 8 --output zbv.svg
  python tools/draw_schedule.py --schedule zb_h1 --stages 4 --micro-batches 8 --costs F=1,I=1.2,W=0.8
  python tools/draw_schedule.py --stages 4 --micro-batches 4 8 16"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="draw_schedule", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedule", choices=get_args(Schedule), help="the schedule to draw; without it, a table of all")
    parser.add_argument("--stages", type=int, required=True, help="pipeline ranks (parallel.pipeline)")
    parser.add_argument("--micro-batches", type=int, nargs="+", required=True, help="micro-batches of a step and data rank")
    parser.add_argument("--virtual-stages", type=int, help="chunks on a rank of the interleaved schedules (2)")
    parser.add_argument(
        "--costs",
        default="F=1,I=1,W=1",
        help="times of one micro-batch on one rank's layers: forward, backward for the input, weight gradients (%(default)s)",
    )
    parser.add_argument("--transfer", type=float, default=0.0, help="time that a message is under way (%(default)s)")
    parser.add_argument("--output", help="picture to write, .svg")
    return shell.run(_run, parser, argv)


def _run(args: argparse.Namespace) -> None:
    if args.transfer < 0:
        raise ConfigError(f"--transfer {args.transfer}: expected 0 or more")
    costs = even_costs(args.stages, *read_costs(args.costs))
    if args.schedule is None:
        if args.output is not None:
            raise ConfigError("--output: a picture is of one schedule; add --schedule")
        print(comparison(args.stages, args.micro_batches, args.virtual_stages or 2, costs, args.transfer))
        return
    if len(args.micro_batches) != 1:
        raise ConfigError(f"--micro-batches: {len(args.micro_batches)} numbers with --schedule, which takes one")
    micro_batches = args.micro_batches[0]
    virtual_stages = args.virtual_stages or (2 if args.schedule in INTERLEAVED else 1)
    plan = _plan(args.schedule, args.stages, micro_batches, virtual_stages)
    played = simulate(plan, costs(plan.n_stages), args.transfer, in_order=False)
    title = (
        f"{args.schedule}: {_count(args.stages, 'rank')}, {_count(micro_batches, 'micro-batch')}, {played.makespan:.4g} a step"
    )
    print(f"{title}\n{by_rank(plan, played)}")
    if args.output is not None:
        _write(args.output, draw(plan, played, title))


def comparison(ranks: int, micro_batches: Sequence[int], virtual_stages: int, costs: CostModel, transfer: float) -> str:
    """All schedules as a Markdown table: idle share and most activations held, for each number of micro-batches.

    Raises ConfigError for numbers that make no plan.
    """
    heads = [f"{what}, {m} micro-batches" for what in ("idle", "held") for m in micro_batches]
    lines = [_line(["schedule", "chunks on a rank", *heads]), _line(["---"] * (2 + len(heads)))]
    for name in get_args(Schedule):
        plans = [_plan(name, ranks, m, virtual_stages if name in INTERLEAVED else 1) for m in micro_batches]
        played = [simulate(plan, costs(plan.n_stages), transfer, in_order=False) for plan in plans]
        chunks = plans[0].n_stages // ranks
        idle = [f"{max(one.idle_share):.1%}" for one in played]
        held = [f"{max(one.peak_live) / chunks:.3g}" for one in played]
        lines.append(_line([name, str(chunks), *idle, *held]))
    return "\n".join(lines)


def by_rank(plan: Plan, played: Simulation) -> str:
    """Idle share and most activations held of each rank, the latter in micro-batches through all of its layers."""
    chunks = plan.n_stages // plan.n_ranks
    rows = zip(played.idle_share, played.peak_live, strict=True)
    lines = [f"{rank:4d}  {idle:6.1%}  {live / chunks:5.3g}" for rank, (idle, live) in enumerate(rows)]
    return "\n".join(["rank    idle   held", *lines])


def read_costs(text: str) -> tuple[float, float, float]:
    """The times of F, I and W in "F=1,I=1,W=1". Raises ConfigError where that is not what stands there."""
    number = r"(\d+\.?\d*|\.\d+)"
    found = re.fullmatch(f"F={number},I={number},W={number}", text)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f'--costs {text}: expected three times, that of F above 0, such as "F=1,I=1.2,W=0.8"')
    return float(found[1]), float(found[2]), float(found[3])


def _plan(name: Schedule, ranks: int, micro_batches: int, virtual_stages: int) -> Plan:
    try:
        return make_plan(name, ranks, micro_batches, virtual_stages)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _write(path: str, text: str) -> None:
    if not path.endswith(".svg"):
        raise ConfigError(f"--output {path}: pictures are SVG files; expected a name that ends in .svg")
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror}") from None
    print(f"{path}: written")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _count(number: int, what: str) -> str:
    plural = "es" if what.endswith("ch") else "s"
    return f"{number} {what}{plural if number != 1 else ''}"
