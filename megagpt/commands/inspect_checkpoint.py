"""tools/inspect_checkpoint.py: what is in a checkpoint, and whether all of it is sound."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from megagpt.checkpoint.format import read_manifest, resolve_checkpoint
from megagpt.checkpoint.inspect import Inspection, Parameter, bytes_to_read, inspect
from megagpt.commands import shell
from megagpt.commands.progress import progress

EXAMPLE = """example:
  python tools/inspect_checkpoint.py runs/quickstart/checkpoints
Files are in bytes, samples in sequences; norm is the L2 norm of the fp32 weight. Values that are NaN or infinite are
counted in the last column. Every file is compared with its size and SHA-256, and the boxes of each tensor must cover it
exactly once: exit code 2 and a line for each thing that is wrong."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="inspect_checkpoint", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint's folder, or a run's (the newest is taken)")
    parser.add_argument(
        "--skip-checksums", action="store_true", help="do not compare files with their SHA-256: half of the reading"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--config", action="store_true", help="print the config that was saved, as JSON, and check no file")
    output.add_argument("--json", action="store_true", help="print one JSON object, for programs; the norm of NaN is null")
    return shell.run(_inspect, parser, argv)


def _inspect(args: argparse.Namespace) -> None:
    folder = resolve_checkpoint(args.checkpoint)
    manifest = read_manifest(folder)
    if args.config:
        print(json.dumps(manifest.config, indent=2))
        return
    checksums = not args.skip_checksums
    with progress("inspect", bytes_to_read(manifest, checksums)) as bar:
        found = inspect(folder, manifest, checksums, bar)
    print(json.dumps(asdict(found), indent=2) if args.json else _text(found))


def _text(found: Inspection) -> str:
    """The report for people."""
    checked = "size and SHA-256 of every file, boxes of every tensor"
    layout = found.layout
    rows = [
        ("step", f"{found.step:,}"),
        ("samples", f"{found.samples:,}"),
        ("optimizer", f"{found.optimizer}, {found.optimizer_step:,} updates"),
        (
            "saved under",
            f"tensor {layout['tensor']}, pipeline {layout['pipeline']}, context {layout['context']}, "
            f"ZeRO stage {layout['zero_stage']}, precision {found.precision}",
        ),
        ("files", f"{found.files:,}, {found.bytes:,} bytes"),
        ("written by", ", ".join(found.nodes)),
        ("checked", checked if found.checksums else "boxes of every tensor; no checksum (--skip-checksums)"),
        ("parameters", f"{found.parameters:,} in {len(found.tensors):,} tensors"),
    ]
    table = [("name", "shape", "norm", "kept", "not finite"), *map(_row, found.tensors)]
    name, shape, norm, kept, _ = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = [found.folder, *(f"  {title:<12} {value}" for title, value in rows), ""]
    lines += [f"  {a:<{name}}  {b:>{shape}}  {c:>{norm}}  {d:<{kept}}  {e}".rstrip() for a, b, c, d, e in table]
    return "\n".join(lines)


def _row(tensor: Parameter) -> tuple[str, str, str, str, str]:
    norm = "nan" if tensor.norm is None else f"{tensor.norm:.6g}"
    wrong = ", ".join(f"{count:,} of {kind}" for kind, count in tensor.non_finite.items())
    return tensor.name, " x ".join(map(str, tensor.shape)), norm, ", ".join(tensor.kinds), f"! {wrong}" if wrong else ""
