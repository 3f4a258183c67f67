"""tools/inspect_checkpoint.py: show what is in a checkpoint, and check all of it."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from megagpt.checkpoint.format import read_manifest, resolve_checkpoint
from megagpt.checkpoint.report import CheckpointReport, TensorReport, bytes_to_read, inspect_checkpoint
from megagpt.commands import shell
from megagpt.commands.progress import progress

EXAMPLE = """example:
  python tools/inspect_checkpoint.py runs/quickstart/checkpoints
Files are in bytes, samples in sequences; norm is the L2 norm of the fp32 weight. The last column counts values that are NaN
or infinite. Every file is compared with its size and SHA-256, and the boxes of each tensor must cover it exactly once;
otherwise the exit code is 2, with one line per problem."""


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("inspect_checkpoint", __doc__, EXAMPLE)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a checkpoint, or of a run (its newest is used)")
    parser.add_argument(
        "--skip-checksums", action="store_true", help="do not compare files with their SHA-256, which halves the bytes read"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--config", action="store_true", help="print the saved config as JSON, and check no files")
    output.add_argument("--json", action="store_true", help="print one JSON object, for programs; a norm that is NaN is null")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return shell.run(_inspect, create_parser(), argv)


def _inspect(args: argparse.Namespace) -> None:
    folder = resolve_checkpoint(args.checkpoint)
    manifest = read_manifest(folder)
    if args.config:
        print(json.dumps(manifest.config, indent=2))
        return
    checksums = not args.skip_checksums
    with progress("inspect", bytes_to_read(manifest, checksums)) as bar:
        report = inspect_checkpoint(folder, manifest, checksums, bar)
    print(json.dumps(asdict(report), indent=2) if args.json else _text(report))


def _text(report: CheckpointReport) -> str:
    """Format the report for people."""
    checked = "size and SHA-256 of every file, boxes of every tensor"
    layout = report.layout
    rows = [
        ("step", f"{report.step:,}"),
        ("samples", f"{report.samples:,}"),
        ("optimizer", f"{report.optimizer}, {report.optimizer_step:,} updates"),
        (
            "saved under",
            f"tensor {layout['tensor']}, pipeline {layout['pipeline']}, context {layout['context']}, "
            f"ZeRO stage {layout['zero_stage']}, precision {report.precision}",
        ),
        ("files", f"{report.files:,}, {report.bytes:,} bytes"),
        ("written by", ", ".join(report.nodes)),
        ("checked", checked if report.checksums else "boxes of every tensor; no checksum (--skip-checksums)"),
        ("parameters", f"{report.parameters:,} in {len(report.tensors):,} tensors"),
    ]
    table = [("name", "shape", "norm", "saved", "not finite"), *map(_row, report.tensors)]
    name, shape, norm, saved, _ = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = [report.folder, *(f"  {title:<12} {value}" for title, value in rows), ""]
    lines += [f"  {a:<{name}}  {b:>{shape}}  {c:>{norm}}  {d:<{saved}}  {e}".rstrip() for a, b, c, d, e in table]
    return "\n".join(lines)


def _row(tensor: TensorReport) -> tuple[str, str, str, str, str]:
    norm = "nan" if tensor.norm is None else f"{tensor.norm:.6g}"
    counts = ", ".join(f"{count:,} of {state}" for state, count in tensor.non_finite.items())
    return tensor.name, " x ".join(map(str, tensor.shape)), norm, ", ".join(tensor.kinds), f"! {counts}" if counts else ""


if __name__ == "__main__":
    sys.exit(main())
