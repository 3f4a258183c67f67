"""tools/export_weights.py: the weights of a checkpoint alone, each whole, in one safetensors file."""

import argparse
import json
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.files import Spec, Written, flush_folder, write_safetensors
from megagpt.checkpoint.format import MASTER, WRITING, resolve_checkpoint
from megagpt.checkpoint.inspect import require_sound
from megagpt.checkpoint.load import Reader
from megagpt.commands import shell
from megagpt.commands.progress import progress
from megagpt.errors import CheckpointError, ConfigError

EXAMPLE = """example:
  python tools/export_weights.py --checkpoint runs/quickstart/checkpoints --dtype bf16 --output gpt.safetensors
Weights bear their logical names, under every layout the same; a tied output layer is embedding.token.weight, once. The
metadata of the file holds "megagpt_config", the model section of the config as JSON, and "step". The disk needs room for
4 bytes a parameter in fp32, 2 in bf16 and fp16; the memory, for the largest weight twice."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BLOCK = 1 << 20
"""Values that are compared at a time."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="export_weights", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint's folder, or a run's (the newest is taken)")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write, .safetensors")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32, bit for bit)")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists, once the new file is whole")
    parser.add_argument(
        "--skip-checksums", action="store_true", help="do not compare the checkpoint's files with their SHA-256"
    )
    return shell.run(_export, parser, argv)


def _export(args: argparse.Namespace) -> None:
    reader, output = Reader(resolve_checkpoint(args.checkpoint)), Path(args.output)
    _check_output(output, reader.folder, args.force)
    tensors = reader.manifest.tensors
    specs = [Spec(name, DTYPES[args.dtype], tuple(record.shape)) for name, record in tensors.items()]
    n_parameters = sum(torch.Size(spec.shape).numel() for spec in specs)
    checksums = not args.skip_checksums
    with progress("export", 4 * n_parameters + reader.manifest.total_bytes * checksums) as bar:
        require_sound(reader.folder, reader.manifest, checksums, bar)
        written = _write(output, specs, reader, bar)
    print(
        f"{output}: {n_parameters:,} parameters in {len(specs):,} tensors, {args.dtype}, {written.bytes:,} bytes, "
        f"of step {reader.manifest.step:,}"
    )


def _check_output(output: Path, checkpoint: Path, force: bool) -> None:
    if output.resolve().parent == checkpoint.resolve():
        raise ConfigError(f"--output {output}: is in the checkpoint's folder, which holds its own files alone")
    if output.is_dir():
        raise ConfigError(f"--output {output}: is a folder; expected the name of a file")
    if output.exists() and not force:
        raise ConfigError(f"--output {output}: exists already; choose another name, or replace it with --force")


def _write(output: Path, specs: list[Spec], reader: Reader, bar: Any) -> Written:
    """The file whole or not at all: aside, flushed to the disk, renamed."""
    try:
        metadata = {"megagpt_config": json.dumps(reader.manifest.config["model"]), "step": str(reader.manifest.step)}
    except KeyError:
        raise CheckpointError(f"{reader.folder}: its config has no section model") from None
    aside = output.with_name(f"{output.name}{WRITING}{secrets.token_hex(4)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            written = write_safetensors(aside, specs, _weights(specs, reader, bar), metadata)
            aside.replace(output)
        finally:
            aside.unlink(missing_ok=True)
        flush_folder(output.parent)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {error.strerror}") from None
    return written


def _weights(specs: list[Spec], reader: Reader, bar: Any) -> Iterator[Tensor]:
    """Each weight, whole; raises CheckpointError where a value is too large for the type."""
    for name, dtype, shape in specs:
        values = reader.read(MASTER, name, Box((0,) * len(shape), shape))
        converted = values.to(dtype)
        too_large = _count_too_large(values, converted)
        if too_large:
            raise CheckpointError(
                f"{reader.folder}: {name}: {too_large} of {values.numel()} values are too large for {dtype}, whose largest is "
                f"{torch.finfo(dtype).max:g}; export it as another --dtype"
            )
        yield converted
        bar.update(values.nbytes)
        del values, converted  # before the next is read


def _count_too_large(values: Tensor, converted: Tensor) -> int:
    """Values that were finite and are infinite after the conversion."""
    blocks = zip(values.flatten().split(_BLOCK), converted.flatten().split(_BLOCK), strict=True)
    return sum(int((after.isinf() & before.isfinite()).sum()) for before, after in blocks)
