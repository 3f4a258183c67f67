"""tools/find_learning_rate.py: train a few steps at growing learning rates, and say which one to begin with."""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.commands import job
from megagpt.errors import ConfigError
from megagpt.training.place import Place

if TYPE_CHECKING:
    from megagpt.training.rate_search import Point, Suggestion

EXAMPLE = """examples:
  python tools/find_learning_rate.py --config configs/quickstart.json --output runs/rates
  torchrun --nproc_per_node 8 tools/find_learning_rate.py --config configs/125M.json --max-rate 0.1 --output rates
The run is that of the config, from its initial weights, with --steps and the rates in place of its length and schedule;
nothing is evaluated or saved. --set checkpoint.resume=PATH begins at a checkpoint."""
NOTHING_ELSE = (
    "training.tokens=null",
    "training.epochs=null",
    "training.batch_ramp=null",
    "checkpoint.dir=null",
    "checkpoint.resume=never",
    "logging.metrics_file=null",
    "logging.wandb.project=null",
)
"""Overrides that leave of a run its steps alone."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parser().parse_args(argv)
    return job.run(lambda place: _find(args, place), args.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="find_learning_rate", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="the run's JSON file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of it")
    # Not --max: torchrun takes that for a torn option of its own, even behind the script's name.
    parser.add_argument("--min-rate", type=float, default=1e-6, help="first rate (1e-6)")
    parser.add_argument("--max-rate", type=float, default=1.0, help="last rate (1)")
    parser.add_argument("--steps", type=int, default=100, help="steps from the first rate to the last (100)")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.csv and PREFIX.png")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser


def _find(args: argparse.Namespace, place: Place) -> None:
    rates = growing_rates(args.min_rate, args.max_rate, args.steps)
    if place.rank == 0:
        _make_table(args.output)
    points: list[Point] = []
    overrides = [*NOTHING_ELSE, f"training.steps={args.steps}", *args.set]
    with job.open_trainer(args.config, overrides, place) as trainer:
        from megagpt.training.rate_search import search, suggest

        for point in search(trainer, rates):
            points.append(point)
            if place.rank == 0:
                _add_row(args.output, len(points), point)
                print(f"step {len(points)}/{args.steps} | lr {point.rate:.3e} | loss {point.loss:.4f}", flush=True)
    if place.rank == 0:
        _report(points, suggest(points), args.output)


def growing_rates(lowest: float, highest: float, steps: int) -> list[float]:
    """`steps` rates from `lowest` to `highest`, each the same multiple of the one before.

    Raises ConfigError where they would not grow.
    """
    if not 0 < lowest < highest or steps < 2:
        raise ConfigError(
            f"rates from {lowest:g} to {highest:g} in {steps} steps: expected 0 < --min-rate < --max-rate, --steps 2 or more"
        )
    return [lowest * (highest / lowest) ** (step / (steps - 1)) for step in range(steps)]


def _make_table(prefix: str) -> None:
    """Begin PREFIX.csv, before any work, so that a place where it cannot be written costs none."""
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{prefix}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(("step", "learning_rate", "loss", "smoothed_loss"))
    except OSError as error:
        raise ConfigError(f"--output {prefix}: cannot be written: {error.strerror}") from None


def _add_row(prefix: str, step: int, point: "Point") -> None:
    with Path(f"{prefix}.csv").open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow((step, *point))


def _report(points: "list[Point]", found: "Suggestion", prefix: str) -> None:
    _draw(points, found, f"{prefix}.png")
    lowest = min(points, key=lambda point: point.smoothed)
    print(
        f"lowest smoothed loss {lowest.smoothed:.4f} at {lowest.rate:.2e}\n"
        f"learning rate to begin with: {found.steepest:.1e} (steepest descent), {found.tenth_of_best:.1e} (a tenth of the "
        f"rate of the lowest loss)\nwritten: {prefix}.csv, {prefix}.png"
    )
    sys.stdout.flush()


def _draw(points: "list[Point]", found: "Suggestion", path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    rates, losses, smoothed = zip(*points, strict=True)
    axes.plot(rates, losses, color="C0", alpha=0.35, linewidth=1, label="loss")
    axes.plot(rates, smoothed, color="C0", linewidth=1.8, label="smoothed")
    for rate, colour, name in (
        (found.steepest, "C1", "steepest descent"),
        (found.tenth_of_best, "C2", "a tenth of the rate of the lowest loss"),
    ):
        axes.axvline(rate, color=colour, linestyle="--", linewidth=1, label=f"{name}: {rate:.1e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, nats per token", ylim=(None, 1.1 * smoothed[0]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)
