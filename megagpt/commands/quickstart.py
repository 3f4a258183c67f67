"""tools/quickstart.py: train a small GPT on the CPUs of this machine, from text to generated text.

It runs the commands that a user would type, and writes everything to runs/quickstart. Each run starts from scratch; only the
tokenizer and the tokens are used again if the text has not changed.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megagpt.commands import shell
from megagpt.commands.quickstart_steps import (
    RunFolder,
    StepRunner,
    corpus_entropy,
    learned_loss,
    log,
    make_tokens,
)
from megagpt.commands.quickstart_text import MIN_CHARACTERS, choose_prompts, read_documents
from megagpt.errors import DataError

ROOT = Path(__file__).parents[2]
CONFIG = Path("configs/quickstart.json")
FOLDER = RunFolder(Path("runs/quickstart"))
RANKS = 8
LAUNCHER = f"deepspeed --log_level error --num_gpus {RANKS}"
"""Without the option, the launcher prints a dozen lines about itself."""
MAX_LOSS_SHARE = 0.95
"""The model has learned from context if its held-out loss is below this share of the unigram entropy.

Measured on held-out parts: 1.00 to 1.02 for token frequencies alone; 0.77 for the default text, and 0.91 for a Chinese novel of
600,000 characters, which has fewer tokens and more different ones.
"""

EXAMPLE = f"""examples:
  make quickstart
  make quickstart TEXT=notes/
Both create .venv first. The run takes 3 to 5 minutes on 2 cores, 8 GB of memory and 30 MB of disk. Losses are in nats
per token. The exit code is 0 if the held-out loss is below {MAX_LOSS_SHARE:.0%} of the unigram entropy, 2 if it is not or
a step failed, and 130 after Ctrl-C."""


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("quickstart", __doc__, EXAMPLE)
    add_text_argument(parser)
    return parser


def add_text_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option for the user's own text."""
    parser.add_argument(
        "--text",
        type=Path,
        metavar="PATH",
        help=f"file or folder of UTF-8 text, at least {MIN_CHARACTERS:,} characters (default: the source code of Python's "
        "standard library)",
    )


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
        raise DataError(f"{ROOT} is not a clone of the repository: it has no {CONFIG}; run `make quickstart` in a clone")
    documents = read_documents(text)
    prompt, next_prompt = choose_prompts(documents)
    make_tokens(FOLDER, documents, run_step)
    tokens, entropy = corpus_entropy(Path(f"{FOLDER.corpus}_text_document"))
    log(f"    {tokens:,} tokens; unigram entropy {entropy:.3f} nats per token, the lowest loss of a model without context")
    run_step(f"Train on {RANKS} CPU ranks", f"{LAUNCHER} pretrain_gpt.py --config {CONFIG}", live=True)
    loss = learned_loss(FOLDER.metrics, entropy, MAX_LOSS_SHARE)
    run_step(
        "Generate a few lines of text",
        f"python tools/generate_text.py --checkpoint {FOLDER.checkpoints} --prompt {shlex.quote(prompt)} "
        "--max-tokens 80 --temperature 0.8 --top-k 40 --seed 1",
        live=True,
    )
    run_step(
        "Plot the loss curve",
        f"python tools/plot_losses.py --metrics {FOLDER.metrics} --output {FOLDER.loss_plot} "
        f"--hline {entropy:.4f} --hline-label 'unigram entropy'",
    )
    log(
        f"\nDone in {time.monotonic() - start:.0f} s: a GPT with held-out loss {loss:.3f} (unigram entropy {entropy:.3f}), "
        f"saved in {FOLDER.checkpoints}\nLoss curve: {FOLDER.loss_plot}; output of each step: {FOLDER.logs}\n\nNext, in {ROOT}:"
    )
    for title, command in next_commands(next_prompt).items():
        log(f"# {title}\n{command}")


def next_commands(prompt: str) -> dict[str, str]:
    """Return commands to run after the quickstart, with a title for each."""
    # The shares of data.split leave enough tokens for a sample of 2,049 in each share of the shortest text.
    gpus = (
        f"configs/125M.json --set data.paths={FOLDER.corpus}_text_document data.split=90,10,0 "
        f"data.tokenizer={FOLDER.tokenizer}.model model.vocab_size=null training.tokens=null training.steps=2000"
    )
    commands = {
        "Generate more text": f"python tools/generate_text.py --checkpoint {FOLDER.checkpoints} --prompt {shlex.quote(prompt)}",
        "Train longer": f"{LAUNCHER} pretrain_gpt.py --config {CONFIG} --set checkpoint.resume=auto training.steps=1000",
        "Draw the loss again": f"python tools/plot_losses.py --metrics {FOLDER.metrics} --output {FOLDER.loss_plot}",
        "Train GPT-3 Small on this text, on 8 GPUs": f"bash examples/single_node.sh 8 {gpus}",
        "The same on 2 nodes under SLURM": f"sbatch --nodes=2 examples/slurm/pretrain.sbatch {gpus}",
    }
    activate = Path(".venv/bin/activate")
    if Path(sys.prefix).resolve() == (ROOT / ".venv").resolve():
        return {"Use the commands of .venv in this shell": f"source {activate}"} | commands
    return commands


if __name__ == "__main__":
    sys.exit(main())
