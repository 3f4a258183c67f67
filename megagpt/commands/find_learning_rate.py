"""tools/find_learning_rate.py: train a few steps at growing learning rates, and suggest one to start with."""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.commands import job, shell
from megagpt.distributed.launcher import Launcher
from megagpt.errors import ConfigError
from megagpt.output import lossy_output, report_unwritable

if TYPE_CHECKING:
    from megagpt.training.lr_finder import Point, Suggestion

EXAMPLE = """examples:
  torchrun --nproc_per_node 4 tools/find_learning_rate.py --config configs/quickstart.json --output runs/rates
  torchrun --nproc_per_node 8 tools/find_learning_rate.py --config configs/125M.json --max-rate 0.1 --output rates
The run starts from the config's initial weights and uses --steps and the growing rates instead of its length and schedule;
nothing is evaluated or saved. --set checkpoint.resume=PATH starts from a checkpoint."""
OVERRIDES = (
    "training.tokens=null",
    "training.epochs=null",
    "training.batch_ramp=null",
    "checkpoint.dir=null",
    "checkpoint.resume=never",
    "resilience.on_spike=none",
    "logging.metrics_file=null",
    "logging.wandb.project=null",
    "logging.tensorboard.dir=null",
)
"""Turn off everything of the run but its training steps. A spike is expected: its update is made."""


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("find_learning_rate", __doc__, EXAMPLE)
    job.add_arguments(parser)
    # Not --max: torchrun takes it for an abbreviation of its own option, even after the script's name.
    parser.add_argument("--min-rate", type=float, default=1e-6, help="first learning rate (%(default)s)")
    parser.add_argument("--max-rate", type=float, default=1.0, help="last learning rate (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="steps from the first rate to the last (%(default)s)")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.csv and PREFIX.png")
    return parser


@report_unwritable
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = job.parse_arguments(create_parser(), argv)
    return job.run(lambda launcher: _find(args, launcher), args.debug)


def _find(args: argparse.Namespace, launcher: Launcher) -> None:
    rates = growing_rates(args.min_rate, args.max_rate, args.steps)
    if launcher.rank == 0:
        _create_table(args.output)
    points: list[Point] = []
    overrides = [*OVERRIDES, *args.set, f"training.steps={args.steps}"]
    with lossy_output(), job.open_trainer(args.config, overrides, launcher) as trainer:
        from megagpt.training.lr_finder import search, suggest

        for point in search(trainer, rates):
            points.append(point)
            if launcher.rank == 0:
                _append_row(args.output, len(points), point)
                print(f"step {len(points)}/{args.steps} | lr {point.learning_rate:.3e} | loss {point.loss:.4f}", flush=True)
    if launcher.rank == 0:
        _report(points, suggest(points), args.output)


def growing_rates(lowest: float, highest: float, steps: int) -> list[float]:
    """Return `steps` rates from `lowest` to `highest` in a geometric series. Raises ConfigError if they would not grow."""
    if not 0 < lowest < highest or steps < 2:
        raise ConfigError(
            f"rates from {lowest:g} to {highest:g} in {steps} steps: expected 0 < --min-rate < --max-rate, --steps 2 or more"
        )
    return [lowest * (highest / lowest) ** (step / (steps - 1)) for step in range(steps)]


def _create_table(prefix: str) -> None:
    """Create PREFIX.csv before any work, so that an output that cannot be written costs no time."""
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{prefix}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(("step", "learning_rate", "loss", "smoothed_loss"))
    except OSError as error:
        raise ConfigError(f"--output {prefix}: cannot be written: {error.strerror}") from None


def _append_row(prefix: str, step: int, point: "Point") -> None:
    with Path(f"{prefix}.csv").open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow((step, *point))


def _report(points: "list[Point]", suggestion: "Suggestion", prefix: str) -> None:
    _draw(points, suggestion, f"{prefix}.png")
    lowest = min(points, key=lambda point: point.smoothed)
    print(
        f"lowest smoothed loss {lowest.smoothed:.4f} at {lowest.learning_rate:.2e}\n"
        f"suggested learning rate: {suggestion.steepest:.1e} (steepest descent), {suggestion.tenth_of_best:.1e} (a tenth of "
        f"the rate with the lowest loss)\nwritten: {prefix}.csv, {prefix}.png"
    )
    sys.stdout.flush()


def _draw(points: "list[Point]", suggestion: "Suggestion", path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    rates, losses, smoothed = zip(*points, strict=True)
    axes.plot(rates, losses, color="C0", alpha=0.35, linewidth=1, label="loss")
    axes.plot(rates, smoothed, color="C0", linewidth=1.8, label="smoothed")
    for rate, colour, name in (
        (suggestion.steepest, "C1", "steepest descent"),
        (suggestion.tenth_of_best, "C2", "a tenth of the rate with the lowest loss"),
    ):
        axes.axvline(rate, color=colour, linestyle="--", linewidth=1, label=f"{name}: {rate:.1e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, nats per token", ylim=(None, 1.1 * smoothed[0]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
