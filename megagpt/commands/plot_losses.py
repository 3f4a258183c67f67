"""tools/plot_losses.py: draw the loss curves of runs from their metrics files."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagpt.commands import shell
from megagpt.errors import ConfigError, DataError

EXAMPLE = """example:
  python tools/plot_losses.py --metrics runs/quickstart/metrics.jsonl --output loss.png"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="plot_losses", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--metrics", action="append", required=True, help="a run's metrics file; give it again for more runs")
    parser.add_argument("--output", required=True, help="picture to write; .png, .svg or .pdf")
    parser.add_argument("--hline", type=float, help="a loss to compare with, nats per token")
    parser.add_argument("--hline-label", default="reference", help="what that loss is")
    return shell.run(_plot, parser, argv)


def _plot(args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    for number, path in enumerate(args.metrics):
        records, colour = read_metrics(path), f"C{number}"
        name = f"{Path(path).parent.name}: " if len(args.metrics) > 1 else ""
        axes.plot(*_curve(records, "loss"), color=colour, alpha=0.55, linewidth=1.2, label=f"{name}training")
        axes.plot(*_curve(records, "eval_loss"), color=colour, marker="o", markersize=4, label=f"{name}validation")
    if args.hline is not None:
        axes.axhline(args.hline, color="0.45", linestyle="--", linewidth=1, label=f"{args.hline_label} ({args.hline:.2f})")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    try:
        figure.savefig(args.output)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output {args.output}: cannot be written: {error}") from None
    print(f"{args.output}: the losses of {len(args.metrics)} run{'s' if len(args.metrics) > 1 else ''}")


def read_metrics(path: str) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that is still being written, or was torn, is left out.

    Raises DataError where the file is missing, has no loss yet or holds something else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a metrics file: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    records = [_record(path, number, line) for number, line in enumerate(lines, start=1)]
    if not any("loss" in record for record in records):
        raise DataError(f"{path}: has no line with a loss yet")
    return records


def _record(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or "step" not in record:
        raise DataError(f"{path}: not a metrics file: line {number} is not a JSON record with a step")
    return record


def _curve(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(record["step"], record[key]) for record in records if key in record]
    return [step for step, _ in found], [value for _, value in found]
