"""tools/inspect_checkpoint.py: show what is in a checkpoint, and check all of it."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import ValidationError

from megagpt.checkpoint.format import IMPORTED_FROM, MANIFEST, Manifest, read_manifest, resolve_checkpoint
from megagpt.checkpoint.report import CheckpointReport, TensorReport, bytes_to_read, inspect_checkpoint
from megagpt.checkpoint.verify import raise_all
from megagpt.commands import shell
from megagpt.commands.progress import progress
from megagpt.config import build_config, upgrade_keys
from megagpt.errors import CheckpointError, ConfigError, listed
from megagpt.training.train_state import ImportedState, RunState

EXAMPLE = """example:
  python tools/inspect_checkpoint.py runs/quickstart/checkpoints
Files are in bytes, samples in sequences; norm is the L2 norm of the fp32 weight. The last column counts values that are NaN
or infinite. The exit code is 2, with one line per problem, if a file differs from its size or SHA-256, if the boxes of a tensor
do not cover it exactly once, if config or state are not those of a run, or if a value is not finite."""


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
    raise_all(folder, config_and_state_problems(folder, manifest))
    checksums = not args.skip_checksums
    with progress("inspect", bytes_to_read(manifest, checksums)) as bar:
        report = inspect_checkpoint(folder, manifest, checksums, bar)
    print(json.dumps(asdict(report), indent=2) if args.json else _text(report))
    if report.non_finite:
        names = [tensor.name for tensor in report.tensors if tensor.non_finite]
        raise CheckpointError(f"{folder}: {report.non_finite:,} values are not finite, in {listed(names)}")


def config_and_state_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Return why a run could not resume with the checkpoint's config and state, one sentence each."""
    problems = []
    try:
        build_config(upgrade_keys(manifest.config), f"{folder / MANIFEST}: config is of another version of megagpt")
    except ConfigError as error:
        problems.append(str(error))
    try:
        (ImportedState if IMPORTED_FROM in manifest.state else RunState).model_validate(manifest.state)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        problems.append(f"{folder / MANIFEST}: state is of another version of megagpt: {key}: {first['msg']}")
    return problems


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
        ("tokenizer", report.tokenizer or "none in the checkpoint"),
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
