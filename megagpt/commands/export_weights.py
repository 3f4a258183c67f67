"""tools/export_weights.py: export the weights of a checkpoint, unsharded, to one safetensors file."""

import argparse
import json
import math
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megagpt.checkpoint.boxes import Box
from megagpt.checkpoint.files import TensorSpec, Written, fsync_folder, write_safetensors
from megagpt.checkpoint.format import MASTER, WRITING, resolve_checkpoint
from megagpt.checkpoint.load import CheckpointReader
from megagpt.checkpoint.merged import open_merged
from megagpt.checkpoint.precision import to_dtype
from megagpt.checkpoint.report import require_valid
from megagpt.checkpoint.tokenizer_files import carried_path
from megagpt.commands import shell
from megagpt.commands.progress import progress
from megagpt.errors import CheckpointError, ConfigError
from megagpt.inference.device import require_memory
from megagpt.progress import Progress

EXAMPLE = """example:
  python tools/export_weights.py --checkpoint runs/quickstart/checkpoints --dtype bf16 --output gpt.safetensors
The names of the weights are the same under every layout; a tied output layer is embedding.token.weight, stored once. The
file's metadata has "megagpt_config", the model section of the config as JSON, and "step". The file takes 4 bytes per
parameter in fp32, and 2 in bf16 and fp16; memory is needed for the largest weight twice."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("export_weights", __doc__, EXAMPLE)
    parser.add_argument("--checkpoint", required=True, help="folder of a checkpoint, or of a run (its newest is used)")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write, .safetensors")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the weights (default: fp32, bit for bit)")
    parser.add_argument("--force", action="store_true", help="replace an existing output once the new file is complete")
    parser.add_argument(
        "--skip-checksums", action="store_true", help="do not compare the checkpoint's files with their SHA-256"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return shell.run(_export, create_parser(), argv)


def _export(args: argparse.Namespace) -> None:
    reader = open_merged(resolve_checkpoint(args.checkpoint))
    output = Path(args.output)
    _check_output(output, reader.folder, args.force)
    tensors = reader.manifest.tensors
    specs = [TensorSpec(name, DTYPES[args.dtype], tuple(record.shape)) for name, record in tensors.items()]
    sizes = [math.prod(spec.shape) for spec in specs]
    n_parameters = sum(sizes)
    checksums = not args.skip_checksums
    total_bytes = 4 * n_parameters + (reader.manifest.total_bytes if checksums else 0)
    with progress("export", total_bytes) as bar:
        require_valid(reader.folder, reader.manifest, checksums, bar)
        largest_twice = max(sizes) * (4 + DTYPES[args.dtype].itemsize)
        require_memory(f"{reader.folder}: its largest weight", largest_twice, torch.device("cpu"), "use a larger machine")
        written = _write(output, specs, reader, bar)
    print(
        f"{output}: {n_parameters:,} parameters in {len(specs):,} tensors, {args.dtype}, {written.bytes:,} bytes, "
        f"of step {reader.manifest.step:,}"
    )
    tokenizer = carried_path(reader.folder, reader.manifest)
    if tokenizer is not None:
        print(f"its tokenizer: {tokenizer}")


def _check_output(output: Path, checkpoint: Path, force: bool) -> None:
    if output.resolve().parent == checkpoint.resolve():
        raise ConfigError(f"--output {output}: is in the checkpoint's folder, which may contain only its own files")
    if output.is_dir():
        raise ConfigError(f"--output {output}: is a folder; expected the name of a file")
    if output.exists() and not force:
        raise ConfigError(f"--output {output}: exists already; choose another name, or replace it with --force")


def _write(output: Path, specs: list[TensorSpec], reader: CheckpointReader, bar: Progress) -> Written:
    """Write the file atomically: to a temporary file, flushed to disk, then renamed."""
    try:
        metadata = {"megagpt_config": json.dumps(reader.manifest.config["model"]), "step": str(reader.manifest.step)}
    except KeyError:
        raise CheckpointError(f"{reader.folder}: its config has no section model") from None
    temporary = output.with_name(f"{output.name}{WRITING}{secrets.token_hex(4)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            written = write_safetensors(temporary, specs, _weights(specs, reader, bar), metadata)
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(output.parent)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {error.strerror}") from None
    return written


def _weights(specs: list[TensorSpec], reader: CheckpointReader, bar: Progress) -> Iterator[Tensor]:
    """Yield each weight, unsharded. Raises CheckpointError if a value is too large for the dtype."""
    for name, dtype, shape in specs:
        values = reader.read(MASTER, name, Box.full(shape))
        converted = to_dtype(values, dtype, f"{reader.folder}: {name}")
        yield converted
        bar.update(values.nbytes)
        del values, converted  # free them before the next weight is read


if __name__ == "__main__":
    sys.exit(main())
