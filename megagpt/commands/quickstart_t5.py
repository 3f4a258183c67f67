"""tools/quickstart_t5.py: pretrain a small T5 on the CPUs of this machine, fine-tune it, and let it write summaries.

It runs the commands that a user would type, and writes everything to runs/quickstart_t5. Each run starts from scratch; only
the tokenizer and the tokens are used again if the text has not changed.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megagpt.commands import shell
from megagpt.commands.quickstart import ROOT, add_text_argument
from megagpt.commands.quickstart_steps import (
    RunFolder,
    StepRunner,
    learned_loss,
    log,
    make_tokens,
    unigram_entropy,
)
from megagpt.commands.quickstart_summaries import summary_pairs
from megagpt.commands.quickstart_text import read_documents
from megagpt.config import load_config
from megagpt.data.blend import build_datasets
from megagpt.data.encoder_samples import encoder_format
from megagpt.errors import DataError
from megagpt.labels import IGNORED

CONFIG = Path("configs/quickstart_t5.json")
RANKS = 4
LAUNCHER = f"deepspeed --log_level error --num_gpus {RANKS}"
FOLDER = RunFolder(Path("runs/quickstart_t5"))
PAIRS = FOLDER.data / "summaries"
"""Prefix of the pairs to fine-tune on; HELD_OUT has those to score."""
HELD_OUT = FOLDER.data / "held_out.jsonl"
TUNED = RunFolder(FOLDER.path / "summaries")
HELD_OUT_SHARE = 0.05
"""Share of the pairs that are held out: those of the last documents."""
MIN_PAIRS = 100
SCORED_PAIRS = 64
ENTROPY_SAMPLES = 2000
"""Samples whose targets give the unigram entropy."""
MAX_LOSS_SHARE = 0.9
"""The model has learned from context if its held-out loss is below this share of the unigram entropy of its targets."""

EXAMPLE = f"""examples:
  make quickstart-t5
  make quickstart-t5 TEXT=notes/
Both create .venv first. The run takes 4 to 6 minutes on 2 cores, 8 GB of memory and 40 MB of disk. Losses are in nats
per token. The exit code is 0 if the held-out loss of span corruption is below {MAX_LOSS_SHARE:.0%} of the unigram entropy of
its targets, 2 if it is not or a step failed, and 130 after Ctrl-C."""


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("quickstart_t5", __doc__, EXAMPLE)
    add_text_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart and return its exit code: 0 only if the model has learned."""
    return shell.run(_quickstart, create_parser(), argv)


def _quickstart(args: argparse.Namespace) -> None:
    text = args.text.absolute() if args.text else None
    os.chdir(ROOT)  # the paths in the config are relative to the repository root
    run_all_steps(text, FOLDER.run)


def run_all_steps(text: Path | None, run_step: StepRunner) -> None:
    """Run the steps in order. Raises DataError if the text is not suitable, and StepError if a step fails."""
    start = time.monotonic()
    if not CONFIG.exists():
        raise DataError(f"{ROOT} is not a clone of the repository: it has no {CONFIG}; run `make quickstart-t5` in a clone")
    documents = read_documents(text)
    pairs = summary_pairs(documents)
    if len(pairs) < MIN_PAIRS:
        raise DataError(
            f"the text has {len(pairs)} functions with a docstring and paragraphs with a short first sentence; expected at "
            f"least {MIN_PAIRS}, to learn summaries from"
        )
    make_tokens(FOLDER, documents, run_step)
    entropy = target_entropy()
    log(f"    unigram entropy of the targets {entropy:.3f} nats per token, the lowest loss of a model without context")
    run_step(f"Pretrain with span corruption on {RANKS} CPU ranks", f"{LAUNCHER} pretrain_t5.py --config {CONFIG}", live=True)
    loss = learned_loss(FOLDER.metrics, entropy, MAX_LOSS_SHARE)
    n_held_out = max(1, round(HELD_OUT_SHARE * len(pairs)))
    for path, part in ((PAIRS.with_suffix(".jsonl"), pairs[:-n_held_out]), (HELD_OUT, pairs[-n_held_out:])):
        path.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in part), encoding="utf-8")
    log(f"Summaries in the text: {len(pairs):,}, of which {n_held_out:,} are held out")
    run_step(
        "Convert the summaries to tokens",
        f"python tools/preprocess_data.py --task pairs --input {PAIRS}.jsonl --tokenizer {FOLDER.tokenizer}.model "
        f"--output-prefix {PAIRS} --overwrite",
    )
    run_step("Fine-tune on the summaries", tuning_command(), live=True)
    run_step(
        "Compare summaries of held-out texts with their own",
        f"python tools/evaluate.py --checkpoint {TUNED.checkpoints} --pairs {HELD_OUT} --max-pairs {SCORED_PAIRS} --beams 2",
        live=True,
    )
    run_step("Write a summary", summary_command(pairs[-1].source), live=True)
    log(
        f"\nDone in {time.monotonic() - start:.0f} s: a T5 with held-out loss {loss:.3f} (unigram entropy of its targets "
        f"{entropy:.3f}), saved in {FOLDER.checkpoints}; fine-tuned in {TUNED.checkpoints}\nOutput of each step: {FOLDER.logs}"
        f"\n\nNext, in {ROOT}:\n# Summarize another text\n{summary_command(pairs[-2].source)}"
    )


def tuning_command() -> str:
    """Return the command that fine-tunes the pretrained model on the pairs."""
    return (
        f"{LAUNCHER} pretrain_t5.py --config {CONFIG} --set data.task=pairs data.paths={PAIRS}_pairs "
        f"data.long_examples=truncate checkpoint.initialize_from={FOLDER.checkpoints} checkpoint.dir={TUNED.checkpoints} "
        f"logging.metrics_file={TUNED.metrics} training.steps=120"
    )


def summary_command(source: str) -> str:
    """Return the command that writes the summary of a text."""
    return (
        f"python tools/generate_text.py --checkpoint {TUNED.checkpoints} --prompt {shlex.quote(source)} --beams 4 "
        "--max-tokens 30"
    )


def target_entropy() -> float:
    """Return the unigram entropy of the targets of span corruption, in nats per token."""
    config = load_config(str(CONFIG), [])
    train = build_datasets(config.data, config.model.n_positions, encoder_format(config.model)).train
    targets = [train.sample(index).labels for index in range(min(ENTROPY_SAMPLES, train.samples_per_epoch))]
    tokens = np.concatenate([target[target != IGNORED] for target in targets if target is not None])
    return unigram_entropy(tokens)


if __name__ == "__main__":
    sys.exit(main())
