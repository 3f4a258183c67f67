"""finetune_classifier.py: train a classifier of texts from a pretrained checkpoint.

The head reads the last token of each text, after dropout, as GPT-1's does (Radford et al. 2018).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagpt.checkpoint.format import read_manifest, resolve_checkpoint
from megagpt.commands import job, shell
from megagpt.config import upgrade_keys
from megagpt.data.offline.labelled import Labelled, classes_of, read_labelled, write_labelled
from megagpt.data.tokenizer import Tokenizer
from megagpt.distributed.launcher import Launcher
from megagpt.errors import CheckpointError, ConfigError
from megagpt.output import lossy_output, note, report_unwritable

EXAMPLE = """examples:
  python finetune_classifier.py --checkpoint runs/6B/checkpoints --train train.jsonl --valid valid.jsonl --output runs/classes
  torchrun --nproc_per_node 8 finetune_classifier.py --checkpoint runs/6B/checkpoints --train train.jsonl --valid valid.jsonl \
--output runs/classes --set parallel.tensor=2 zero.stage=1
An example is a JSON line such as {"text": "...", "label": "..."}. Short texts share a sample, without seeing each other; of a
longer text than model.n_positions tokens the end is used. The run writes checkpoints, metrics.jsonl with the confusion matrix
of each evaluation, and config.json to the output folder; started again, it resumes."""
NO_CLASSIFIER = "a pretrained model, not a classifier"


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("finetune_classifier.py", __doc__, EXAMPLE)
    parser.add_argument("--checkpoint", required=True, help="folder of a pretrained checkpoint, or of a run (its newest)")
    parser.add_argument("--train", required=True, metavar="FILE", help="labelled texts to learn from, .jsonl or .parquet")
    parser.add_argument("--valid", required=True, metavar="FILE", help="labelled texts for accuracy and confusion matrix")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder for everything that the run writes")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer to use instead of the checkpoint's")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over the training texts (default: %(default)s)")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="samples of model.n_positions tokens per step, each with one or more texts (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate", type=float, default=6.25e-5, metavar="RATE", help="peak learning rate (default: %(default)s)"
    )
    parser.add_argument(
        "--dropout", type=float, default=0.1, metavar="P", help="model.clf_pdrop, before the head (default: %(default)s)"
    )
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of the config that it writes"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser


@report_unwritable
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = job.parse_arguments(create_parser(), argv)
    return job.run(lambda launcher: _finetune(args, launcher), args.debug)


def _finetune(args: argparse.Namespace, launcher: Launcher) -> int:
    path = Path(args.output) / "config.json"
    if launcher.rank == 0:
        _prepare(args, path)
    with lossy_output(), job.open_trainer(str(path), args.set, launcher) as trainer:
        from megagpt.training.banner import announce_run

        announce_run(trainer)
        code = trainer.train()
    if launcher.rank == 0 and code == 0:
        _print_result(trainer.config.data.classes, Path(args.output) / "metrics.jsonl")
    return code


def _prepare(args: argparse.Namespace, path: Path) -> None:
    """Write the data and the config of the run. Raises ConfigError, DataError and CheckpointError."""
    from megagpt.inference.load import load_run_tokenizer

    folder = resolve_checkpoint(args.checkpoint)
    manifest = read_manifest(folder)
    saved = upgrade_keys(manifest.config)
    model = saved.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("n_positions"), int):
        raise CheckpointError(f"{folder}: its config has no model.n_positions; expected {NO_CLASSIFIER}")
    if saved.get("data", {}).get("classes"):
        raise CheckpointError(f"{folder}: is a classifier; expected {NO_CLASSIFIER}")
    tokenizer = load_run_tokenizer(folder, manifest, args.tokenizer)
    parts = {name: read_labelled(Path(getattr(args, name))) for name in ("train", "valid")}
    classes = classes_of(parts["train"])
    prefixes = _write_data(parts, classes, tokenizer, model["n_positions"], path.parent / "data")
    config = _config(args, model | {"clf_pdrop": args.dropout}, classes, prefixes, folder)
    try:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror}") from None


def _write_data(
    parts: dict[str, list[Labelled]], classes: list[str], tokenizer: Tokenizer, max_tokens: int, folder: Path
) -> dict[str, str]:
    """Write the token files; return their prefixes."""
    prefixes = {name: str(folder / name) for name in parts}
    for name, examples in parts.items():
        n_cut = write_labelled(examples, classes, tokenizer, max_tokens, prefixes[name])
        if n_cut:
            note(f"{name}: {n_cut:,} of {len(examples):,} texts are longer than {max_tokens:,} tokens; their ends are used")
    return prefixes


def _config(
    args: argparse.Namespace, model: dict[str, Any], classes: list[str], prefixes: dict[str, str], checkpoint: Path
) -> dict[str, Any]:
    return {
        "model": model,
        "data": {"task": "classification", "classes": classes, **prefixes},
        "training": {"epochs": args.epochs, "micro_batch_size": 1, "global_batch_size": args.batch_size},
        "optimizer": {"learning_rate": args.learning_rate, "weight_decay": 0.01, "betas": [0.9, 0.999]},
        "lr_schedule": {"type": "linear"},
        "evaluation": {"samples": None},
        "checkpoint": {"dir": str(Path(args.output) / "checkpoints"), "initialize_from": str(checkpoint), "keep": 1},
        "logging": {"metrics_file": str(Path(args.output) / "metrics.jsonl")},
    }


def _print_result(classes: Sequence[str], metrics: Path) -> None:
    """Print the accuracy and the confusion matrix of the last evaluation."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    last = next((record for record in reversed(records) if "eval_confusion" in record), None)
    if last is None:
        return
    print(f"accuracy {last['eval_accuracy']:.1%} on {sum(map(sum, last['eval_confusion'])):,} texts")
    print("confusion matrix: a row for each class, a column for each predicted class")
    rows = [["", *classes], *([name, *map(str, row)] for name, row in zip(classes, last["eval_confusion"], strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
