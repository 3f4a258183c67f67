"""tools/quickstart.py: train a small GPT on the CPUs of this machine, from text to generated text.

It runs the commands that a user would type, and writes everything to runs/quickstart. Each run starts from scratch; only the
tokenizer and the tokens are used again if the text has not changed.
"""

import argparse
import codecs
import hashlib
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from megagpt import __version__
from megagpt.commands import shell
from megagpt.commands.train_tokenizer import vocab_size_for
from megagpt.data.indexed import IndexedCorpus
from megagpt.errors import DataError, MegagptError

ROOT = Path(__file__).parents[2]
CONFIG = Path("configs/quickstart.json")
FOLDER = Path("runs/quickstart")
LOGS = FOLDER / "logs"
CHECKPOINTS = FOLDER / "checkpoints"
METRICS = FOLDER / "metrics.jsonl"
LOSS_PLOT = FOLDER / "loss.png"
DATA = FOLDER / "data"
TEXT = DATA / "text"
TOKENIZER = DATA / "tokenizer"
CORPUS = DATA / "corpus"
TEXT_HASH = DATA / "text_hash"
"""Written when the tokenizer and the tokens of the text are complete."""

RANKS = 8
LAUNCHER = f"deepspeed --log_level error --num_gpus {RANKS}"
"""Without the option, the launcher prints a dozen lines about itself."""
MIN_VOCAB_SIZE = 3072
"""Size of the vocabulary, unless the text has so many different characters that it needs a larger one."""
MIN_PROMPT = 8
MAX_PROMPT = 40
"""Characters of a prompt."""
UNSPACED_PROMPT = 6
"""Characters of a prompt from a text without spaces, such as Chinese."""
MIN_CHARACTERS = 200_000
MAX_CHARACTERS = 8_000_000
MIN_DOCUMENTS = 200
"""Fewer documents are divided into smaller ones, so that the split by documents leaves enough of them to evaluate on."""
TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})
GENERATED_FOLDERS = frozenset({"encodings", "pydoc_data"})
"""Folders of the standard library with generated files: megabytes of numbers and help texts instead of code."""
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


class StepRunner(Protocol):
    """Runs one step."""

    def __call__(self, title: str, command: str, live: bool = False) -> None:
        """Run a command; show its output if `live`. Raises StepError if it fails."""


class StepError(MegagptError):
    """A step that failed, or a result that is not good enough."""


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = shell.command_parser("quickstart", __doc__, EXAMPLE)
    parser.add_argument(
        "--text",
        type=Path,
        metavar="PATH",
        help=f"file or folder of UTF-8 text, at least {MIN_CHARACTERS:,} characters (default: the source code of Python's "
        "standard library)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart and return its exit code: 0 only if the model has learned."""
    return shell.run(_quickstart, create_parser(), argv)


def _quickstart(args: argparse.Namespace) -> None:
    text = args.text.absolute() if args.text else None
    os.chdir(ROOT)  # the paths in the config are relative to the repository root
    run_all_steps(text, run_process)


def run_all_steps(text: Path | None, run_step: StepRunner) -> None:
    """Run the steps in order. Raises DataError if the text is not suitable, and StepError if a step fails."""
    start = time.monotonic()
    if not CONFIG.exists():
        raise DataError(f"{ROOT} is not a clone of the repository: it has no {CONFIG}; run `make quickstart` in a clone")
    documents = read_documents(text)
    prompt, next_prompt = choose_prompts(documents)
    if not prepare_folder(documents):
        run_step(
            "Train a tokenizer",
            f"python tools/train_tokenizer.py --input {TEXT} --output {TOKENIZER} "
            f"--vocab-size {vocab_size_for(documents, MIN_VOCAB_SIZE)}",
        )
        run_step(
            "Convert the text to tokens",
            f"python tools/preprocess_data.py --input {TEXT} --tokenizer {TOKENIZER}.model --output-prefix {CORPUS} "
            "--append-eod --workers 2",
        )
        TEXT_HASH.write_text(text_hash(documents))
    tokens, entropy = unigram_entropy(Path(f"{CORPUS}_text_document"))
    log(f"    {tokens:,} tokens; unigram entropy {entropy:.3f} nats per token, the lowest loss of a model without context")
    run_step(f"Train on {RANKS} CPU ranks", f"{LAUNCHER} pretrain_gpt.py --config {CONFIG}", live=True)
    loss = last_eval_loss(METRICS)
    log(f"    held-out loss {loss:.3f} nats per token, unigram entropy {entropy:.3f}")
    if loss >= MAX_LOSS_SHARE * entropy:
        raise StepError(f"the held-out loss {loss:.3f} is not below {MAX_LOSS_SHARE:.0%} of the unigram entropy {entropy:.3f}")
    run_step(
        "Generate a few lines of text",
        f"python tools/generate_text.py --checkpoint {CHECKPOINTS} --prompt {shlex.quote(prompt)} "
        "--max-tokens 80 --temperature 0.8 --top-k 40 --seed 1",
        live=True,
    )
    run_step(
        "Plot the loss curve",
        f"python tools/plot_losses.py --metrics {METRICS} --output {LOSS_PLOT} "
        f"--hline {entropy:.4f} --hline-label 'unigram entropy'",
    )
    log(
        f"\nDone in {time.monotonic() - start:.0f} s: a GPT with held-out loss {loss:.3f} (unigram entropy {entropy:.3f}), "
        f"saved in {CHECKPOINTS}\nLoss curve: {LOSS_PLOT}; output of each step: {LOGS}\n\nNext, in {ROOT}:"
    )
    for title, command in next_commands(next_prompt).items():
        log(f"# {title}\n{command}")


def next_commands(prompt: str) -> dict[str, str]:
    """Return commands to run after the quickstart, with a title for each."""
    # The shares of data.split leave enough tokens for a sample of 2,049 in each share of the shortest text.
    gpus = (
        f"configs/125M.json --set data.paths={CORPUS}_text_document data.split=90,10,0 data.tokenizer={TOKENIZER}.model "
        "model.vocab_size=null training.tokens=null training.steps=2000"
    )
    commands = {
        "Generate more text": f"python tools/generate_text.py --checkpoint {CHECKPOINTS} --prompt {shlex.quote(prompt)}",
        "Train longer": f"{LAUNCHER} pretrain_gpt.py --config {CONFIG} --set checkpoint.resume=auto training.steps=1000",
        "Draw the loss again": f"python tools/plot_losses.py --metrics {METRICS} --output {LOSS_PLOT}",
        "Train GPT-3 Small on this text, on 8 GPUs": f"bash examples/single_node.sh 8 {gpus}",
        "The same on 2 nodes under SLURM": f"sbatch --nodes=2 examples/slurm/pretrain.sbatch {gpus}",
    }
    activate = Path(".venv/bin/activate")
    if Path(sys.prefix).resolve() == (ROOT / ".venv").resolve():
        return {"Use the commands of .venv in this shell": f"source {activate}"} | commands
    return commands


def choose_prompts(documents: Sequence[str]) -> tuple[str, str]:
    """Return two prompts that suit the text: the two most frequent beginnings of its lines.

    A beginning is the first two words, or the first few characters of a line without spaces.
    """
    beginnings = Counter(
        beginning for document in documents for line in document.splitlines() if (beginning := _beginning(line.strip()))
    )
    first, *others = [beginning for beginning, _ in beginnings.most_common(2)] or [documents[0].strip()[:UNSPACED_PROMPT]]
    return first, others[0] if others else first


def _beginning(line: str) -> str:
    """Return the start of a line as a prompt; an empty string if it is too short or has no words."""
    words = line.split(maxsplit=2)
    if len(words) == 3 and MIN_PROMPT <= len(prompt := " ".join(words[:2])) <= MAX_PROMPT:
        return prompt if sum(map(str.isalpha, prompt)) >= MIN_PROMPT // 2 else ""
    unspaced = len(words) > 0 and len(words[0]) > MAX_PROMPT
    return line[:UNSPACED_PROMPT] if unspaced and line[:UNSPACED_PROMPT].isalpha() else ""


def read_documents(text: Path | None) -> list[str]:
    """Return the documents to train on, at most MAX_CHARACTERS in total, in a fixed random order.

    The order matters because data.split takes the first documents for training and later ones for evaluation.
    Raises DataError if the text is missing or too short.
    """
    if text is None:
        documents = list(read_folder(_standard_library(), "*.py", skipped=TEST_FOLDERS | GENERATED_FOLDERS))
    elif text.is_dir():
        documents = list(read_folder(text, "*", skipped=frozenset({"__pycache__", ".git"})))
    elif text.is_file():
        documents = [read_text(text)]
    else:
        raise DataError(f"TEXT={text}: no such file or folder")
    n_characters = sum(map(len, documents))
    if n_characters < MIN_CHARACTERS:
        raise DataError(
            f"{text or _standard_library()}: {n_characters:,} characters of UTF-8 text; at least {MIN_CHARACTERS:,} are needed"
        )
    if len(documents) < MIN_DOCUMENTS:
        length = n_characters // MIN_DOCUMENTS
        documents = [piece for document in documents for piece in divide(document, length)]
    random.Random(0).shuffle(documents)
    return documents


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def read_folder(folder: Path, pattern: str, skipped: frozenset[str]) -> Iterator[str]:
    """Yield the texts of the files that match, in a fixed random order, at most MAX_CHARACTERS in total.

    Files below a folder named in `skipped`, and files that are not text, are skipped.
    """
    paths = sorted(path for path in folder.rglob(pattern) if not skipped & set(path.relative_to(folder).parts))
    random.Random(0).shuffle(paths)
    n_characters = 0
    for path in paths:
        text = read_text(path) if path.is_file() else ""
        n_characters += len(text)
        if n_characters > MAX_CHARACTERS:
            return
        if text:
            yield text


def read_text(path: Path) -> str:
    """Return the first MAX_CHARACTERS bytes of a file as text; an empty string if it is not UTF-8 or cannot be read."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CHARACTERS)
        text = codecs.getincrementaldecoder("utf-8")().decode(raw)  # incremental: the last character may be incomplete
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if "\0" in text else text


def divide(text: str, length: int) -> Iterator[str]:
    """Yield the text in pieces of complete lines; all but the last have at least `length` characters."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + length) + 1 or len(text)
        yield text[start:end]
        start = end


def prepare_folder(documents: list[str]) -> bool:
    """Empty runs/quickstart and write the documents there.

    Returns True, and keeps the tokenizer and the tokens, if those of the same documents are there already.
    """
    unchanged = TEXT_HASH.exists() and TEXT_HASH.read_text() == text_hash(documents)
    for path in FOLDER.glob("*"):
        if path == DATA and unchanged:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    LOGS.mkdir(parents=True)
    if unchanged:
        log(f"The text is the same as in the last run; using its tokens in {DATA}")
        return True
    TEXT.mkdir(parents=True)
    for number, document in enumerate(documents):
        (TEXT / f"{number:05d}.txt").write_text(document, encoding="utf-8")
    log(f"Text: {len(documents):,} documents, {sum(map(len, documents)):,} characters")
    return False


def text_hash(documents: list[str]) -> str:
    """Return a SHA-256 hash of all that the tokens depend on: the documents, the vocabulary size and megagpt's version."""
    digest = hashlib.sha256(f"{__version__} {MIN_VOCAB_SIZE}".encode())
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()


def unigram_entropy(prefix: Path) -> tuple[int, float]:
    """Return the number of tokens of a corpus, and the entropy of their frequencies in nats per token.

    No model that ignores the context can have a lower loss on these tokens (Shannon 1948).
    """
    corpus = IndexedCorpus(prefix)
    tokens = np.concatenate([corpus.read(sequence, 0, int(size)) for sequence, size in enumerate(corpus.sizes)])
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return len(tokens), float(-(shares * np.log(shares)).sum())


def last_eval_loss(metrics: Path) -> float:
    """Return the held-out loss of the last evaluation, in nats per token. Raises StepError if there is none."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    if not losses:
        raise StepError(f"{metrics}: no line with eval_loss; the training run has not evaluated")
    if losses[-1] is None:
        raise StepError(f"{metrics}: the last eval_loss is not a finite number")
    return float(losses[-1])


def run_process(title: str, command: str, live: bool = False) -> None:
    """Run a command; its output goes to a log file named after its script, and also to the console if `live`.

    Raises StepError if the command fails, after the end of its output is printed.
    """
    words = shlex.split(command)
    script = next(Path(word) for word in words if word.endswith(".py"))
    log_file = LOGS / f"{script.stem}.log"
    log(f"{title}: {command}")
    last_lines = deque[str](maxlen=40)
    with (
        log_file.open("w") as file,
        subprocess.Popen(
            words, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            last_lines.append(line)
            if live:
                print(f"    {line}", end="", flush=True)
    if process.returncode == 0:
        return
    if not live:
        print("".join(last_lines), end="", file=sys.stderr)
    raise StepError(f"{title!r} failed with exit code {process.returncode}; its full output: {log_file}")


def child_environment() -> dict[str, str]:
    """Return the caller's environment, with this interpreter's scripts first in PATH, no GPU, and one thread per rank."""
    scripts = sysconfig.get_path("scripts")
    return os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def log(line: str) -> None:
    """Print a line at once, so that it appears before the output of the next step."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
