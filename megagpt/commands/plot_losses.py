"""tools/plot_losses.py: draw the loss curves of runs from their metrics files."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, BinaryIO

from megagpt.commands import shell
from megagpt.errors import ConfigError, DataError
from megagpt.training.loggers.metrics_file import MAX_LINE_BYTES, lines_of, parse_record

EXAMPLE = """example:
  python tools/plot_losses.py --metrics runs/quickstart/metrics.jsonl --output loss.png
The x axis is the optimizer step, the y axis the loss in nats per token."""


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("plot_losses", __doc__, EXAMPLE)
    parser.add_argument(
        "--metrics",
        action="append",
        required=True,
        metavar="FILE",
        help="metrics file of a run (logging.metrics_file); repeat the flag for more runs",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="image file to write: .png, .svg or .pdf")
    parser.add_argument("--hline", type=float, metavar="LOSS", help="draw a line at a loss to compare with, in nats per token")
    parser.add_argument("--hline-label", default="reference", metavar="TEXT", help="name of that loss (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return shell.run(_plot, create_parser(), argv)


def _plot(args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    names = _run_names(args.metrics)
    for number, path in enumerate(args.metrics):
        records = read_metrics(path)
        color = f"C{number}"
        label = f"{names[number]}: " if len(names) > 1 else ""
        axes.plot(*_curve(records, "loss"), color=color, alpha=0.55, linewidth=1.2, label=f"{label}training")
        for name, marker in zip(_validation_losses(records), cycle("os^vD"), strict=False):
            which = name.removeprefix("eval").removesuffix("_loss").replace("_", " ", 1)
            axes.plot(*_curve(records, name), color=color, marker=marker, markersize=4, label=f"{label}validation{which}")
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


def _validation_losses(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the losses on validation data: one, or one for each set."""
    found = {name for record in records for name in record if name.startswith("eval_") and name.endswith("_loss")}
    return sorted(found) or ["eval_loss"]


def _run_names(paths: Sequence[str]) -> list[str]:
    """Return names that distinguish the runs: their folders if these differ, else their files, else their paths."""
    folders = [Path(path).resolve().parent.name for path in paths]
    files = [Path(path).stem for path in paths]
    for names in (folders, files):
        if len(set(names)) == len(paths):
            return names
    return list(paths)


def read_metrics(path: str) -> list[dict[str, Any]]:
    """Return the records of a metrics file. An incomplete last line, of a run that is being written, is ignored.

    Raises DataError if the file is missing, is not a metrics file, or has no finite loss yet.
    """
    try:
        with Path(path).open("rb") as file:
            records = list(_records(path, file))
    except OSError as error:
        raise DataError(f"{path}: not a metrics file: {error.strerror}") from None
    if not any(record.get("loss") is not None for record in records):
        raise DataError(f"{path}: has no line with a loss yet")
    return records


def _records(path: str, file: BinaryIO) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines_of(file), start=1):
        record = parse_record(line)
        if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
            return
        if record is None:
            raise DataError(f"{path}: not a metrics file: line {number} is not a JSON record with a step")
        yield record


def _curve(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and the values of the records that have a value under `key`; null, for NaN and Infinity, is none."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


if __name__ == "__main__":
    sys.exit(main())
