"""tools/convert_checkpoint.py: turn a Hugging Face model into a checkpoint, and a checkpoint into a Hugging Face model."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megagpt.checkpoint.format import resolve_checkpoint
from megagpt.checkpoint.merged import open_merged
from megagpt.checkpoint.report import require_valid
from megagpt.commands import shell
from megagpt.commands.progress import progress
from megagpt.errors import CheckpointError, ConfigError
from megagpt.hugging_face.compare_logits import check_tokens, difference, our_logits, require_transformers, their_logits
from megagpt.hugging_face.export_model import DTYPES, Export, require_replaceable
from megagpt.hugging_face.families import FAMILIES
from megagpt.hugging_face.folder import ModelFolder
from megagpt.hugging_face.import_model import MODEL_FILE, Import
from megagpt.hugging_face.peak_memory import PeakMemory
from megagpt.inference.device import require_memory
from megagpt.inference.load import load_model

EXAMPLE = """examples:
  python tools/convert_checkpoint.py to-hf runs/quickstart/checkpoints --output runs/quickstart/hf --check
  python tools/convert_checkpoint.py from-hf runs/quickstart/hf --output runs/imported --check
docs/models.md has the families, and how to continue pretraining from an imported model. Checkpoints are always fp32. Memory is
needed for the largest parameter, two or three times; with --check for the entire model in fp32, one side after the other."""
DEFAULT_FILE_BYTES = 5 * 10**9
SMALLEST_FILE_BYTES = 10**3


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("convert_checkpoint", __doc__, EXAMPLE)
    directions = parser.add_subparsers(dest="direction", required=True, metavar="from-hf | to-hf", parser_class=shell.Parser)
    importer = directions.add_parser("from-hf", help="a folder of a Hugging Face model -> a checkpoint")
    importer.add_argument("source", metavar="DIR", help="folder with config.json and model.safetensors, or its parts")
    importer.add_argument("--output", required=True, metavar="CKPT", help="new folder for the checkpoint")
    importer.add_argument(
        "--resize-vocab",
        type=int,
        metavar="N",
        help="cut the vocabulary to its first N tokens, or add tokens whose weights are the mean of the others",
    )
    exporter = directions.add_parser("to-hf", help="a checkpoint -> a folder of a Hugging Face model")
    exporter.add_argument("source", metavar="CKPT", help="folder of a checkpoint, or of a run (its newest is used)")
    exporter.add_argument("--output", required=True, metavar="DIR", help="new folder for the model")
    exporter.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: training.precision of the run)")
    exporter.add_argument("--family", choices=FAMILIES, help="model_type (default: the first that covers the model)")
    exporter.add_argument(
        "--max-file-bytes",
        type=int,
        default=DEFAULT_FILE_BYTES,
        metavar="N",
        help="start a new file, with an index, if the next tensor would exceed this (default: %(default)s)",
    )
    exporter.add_argument("--force", action="store_true", help="replace an existing model once the new one is complete")
    exporter.add_argument(
        "--skip-checksums", action="store_true", help="do not compare the checkpoint's files with their SHA-256"
    )
    for direction in (importer, exporter):
        direction.add_argument(
            "--check", action="store_true", help="compare the logits of both sides on a few tokens; needs transformers"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return shell.run(_convert, create_parser(), argv)


def _convert(args: argparse.Namespace) -> None:
    if args.check:
        require_transformers()
    if args.direction == "from-hf":
        _from_hugging_face(args)
    else:
        _to_hugging_face(args)


def _from_hugging_face(args: argparse.Namespace) -> None:
    if args.resize_vocab is not None and not 2 <= args.resize_vocab < 2**31:
        raise ConfigError(f"--resize-vocab {args.resize_vocab}: expected 2 to {2**31 - 1} tokens")
    source = ModelFolder(Path(args.source))
    plan = Import(source, args.resize_vocab)
    _require_memory(str(source.folder), plan.largest_bytes)
    memory = PeakMemory()
    with progress("import", plan.total_bytes) as bar:
        result = plan.write(Path(args.output), memory, bar)
    print(f"{result.folder}: {result.architecture}, {result.n_parameters:,} parameters, from {source.folder}")
    _print_memory(memory, result.largest_bytes)
    print(f'start a run from it: "extends": "{Path(args.output) / MODEL_FILE}" and checkpoint.initialize_from={args.output}')
    _print_notes(result.notes)
    if args.check:
        _check(result.folder, source.folder, torch.float32)


def _to_hugging_face(args: argparse.Namespace) -> None:
    if args.max_file_bytes < SMALLEST_FILE_BYTES:
        raise ConfigError(f"--max-file-bytes {args.max_file_bytes}: expected {SMALLEST_FILE_BYTES} or more")
    reader = open_merged(resolve_checkpoint(args.source))
    output = Path(args.output)
    require_replaceable(output, reader.folder, args.force)
    checksums = not args.skip_checksums
    with progress("verify", reader.manifest.total_bytes if checksums else 0) as bar:
        require_valid(reader.folder, reader.manifest, checksums, bar)
    plan = Export(reader, args.family, args.dtype)
    _require_memory(str(reader.folder), plan.largest_bytes)
    memory = PeakMemory()
    with progress("export", plan.total_bytes) as bar:
        result = plan.write(output, args.max_file_bytes, args.force, memory, bar)
    files = "1 file" if result.n_files == 1 else f"{result.n_files} files"
    print(
        f"{output}: {result.architecture}, {result.n_parameters:,} parameters, {plan.dtype}, "
        f"{result.n_bytes:,} bytes in {files}, of step {reader.manifest.step:,}"
    )
    _print_memory(memory, result.largest_bytes)
    _print_notes(result.notes)
    if args.check:
        _check(reader.folder, output, DTYPES[plan.dtype])


def _require_memory(source: str, largest_bytes: int) -> None:
    require_memory(f"{source}: its largest parameter", 3 * largest_bytes, torch.device("cpu"), "use a larger machine")


def _print_memory(memory: PeakMemory, largest_bytes: int) -> None:
    peak = "not measured on this system" if memory.bytes is None else f"{memory.bytes:,} bytes"
    print(f"peak memory for tensors: {peak}; the largest parameter in fp32 has {largest_bytes:,} bytes")


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _check(checkpoint: Path, folder: Path, dtype: torch.dtype) -> None:
    """Compare the logits of both sides. Raises CheckpointError if they differ; what was written stays."""
    model, config = load_model(checkpoint, checksums=False)
    vocab_size = min(config.model.tokens_in_vocab, ModelFolder(folder).config["vocab_size"])
    tokens = check_tokens(vocab_size, config.model.n_positions)
    ours = our_logits(model, tokens, dtype)
    del model  # free it before the other side is loaded
    found = difference(ours, their_logits(folder, tokens))
    text = f"logits of {found.n_tokens} tokens, up to {found.scale:.3g}, differ by at most {found.largest:.3g}"
    if not found.is_small:
        raise CheckpointError(f"{checkpoint} and {folder} are different models: {text}")
    print(f"checked with transformers: {text}")


if __name__ == "__main__":
    sys.exit(main())
