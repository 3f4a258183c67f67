"""`make quickstart`: the main job on this machine, from text to samples, by the commands that a user would type.

Everything lies in runs/quickstart. Every run starts anew there; only the tokens are kept while the text stays the same.
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
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megagpt import __version__
from megagpt.data.indexed import IndexedCorpus
from megagpt.errors import DataError, MegagptError

ROOT = Path(__file__).parents[2]
CONFIG = Path("configs/quickstart.json")
FOLDER = Path("runs/quickstart")
LOGS, CHECKPOINTS, METRICS, CURVE = FOLDER / "logs", FOLDER / "checkpoints", FOLDER / "metrics.jsonl", FOLDER / "loss.png"
DATA = FOLDER / "data"
SOURCES, TOKENIZER, CORPUS, FINGERPRINT = DATA / "text", DATA / "tokenizer", DATA / "corpus", DATA / "fingerprint"

RANKS = 8
VOCABULARY = 3072
PROMPT = "def __init__(self"
MIN_CHARACTERS, MAX_CHARACTERS = 200_000, 8_000_000
MIN_DOCUMENTS = 200
"""With fewer documents than this they are cut, so that the split by documents leaves enough to evaluate on."""
TESTS = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})
TABLES = frozenset({"encodings", "pydoc_data"})
"""Folders of the standard library that scripts wrote: megabytes of numbers and help texts, not code to learn from."""
CLEARLY_BELOW = 0.9
"""The model has learned if its held-out loss is below this share of the entropy of single tokens."""


class StepError(MegagptError):
    """A step of the recipe that failed or whose result will not do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code, 0 exactly when the model has learned."""
    parser = argparse.ArgumentParser(prog="quickstart", description="Train a small GPT on this machine, from text to samples.")
    parser.add_argument("--text", type=Path, help="file or folder of UTF-8 text; the standard library's sources if absent")
    text: Path | None = parser.parse_args(argv).text
    text = text.absolute() if text else None
    os.chdir(ROOT)  # the config names its files from the repository root
    try:
        run_recipe(text)
    except MegagptError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run_recipe(text: Path | None) -> None:
    """The steps, in order. Raises DataError for a text that will not do and StepError for a step that fails."""
    started = time.monotonic()
    if not CONFIG.exists():
        raise DataError(f"{ROOT} is not a clone of the repository, which has {CONFIG}; run `make quickstart` in one")
    documents = read_documents(text)
    if not prepare_folder(documents):
        run(
            "Train a tokenizer",
            f"python tools/train_tokenizer.py --input {SOURCES} --output {TOKENIZER} --vocab-size {VOCABULARY}",
        )
        run(
            "Cut the text into tokens",
            f"python tools/preprocess_data.py --input {SOURCES} --tokenizer {TOKENIZER}.model --output-prefix {CORPUS} "
            "--append-eod --workers 2",
        )
        FINGERPRINT.write_text(fingerprint(documents))
    tokens, entropy = unigram_entropy(Path(f"{CORPUS}_text_document"))
    say(f"    {tokens:,} tokens; their unigram entropy, the least loss without context: {entropy:.3f} nats per token")
    run(f"Train on {RANKS} CPU ranks", f"deepspeed --num_gpus {RANKS} pretrain_gpt.py --config {CONFIG}", live=True)
    loss = last_eval_loss(METRICS)
    say(f"    held-out loss {loss:.3f} nats per token, unigram entropy {entropy:.3f}")
    if loss >= CLEARLY_BELOW * entropy:
        raise StepError(f"the held-out loss {loss:.3f} is not below {CLEARLY_BELOW:.0%} of the unigram entropy {entropy:.3f}")
    run(
        "Generate a few lines",
        f"python tools/generate_text.py --checkpoint {CHECKPOINTS} --prompt {shlex.quote(PROMPT)} "
        "--max-tokens 80 --temperature 0.8 --top-k 40 --seed 1",
        live=True,
    )
    run(
        "Draw the loss curve",
        f"python tools/plot_losses.py --metrics {METRICS} --output {CURVE} "
        f"--hline {entropy:.4f} --hline-label 'unigram entropy'",
    )
    say(summary(loss, entropy, time.monotonic() - started))


def summary(loss: float, entropy: float, seconds: float) -> str:
    """Five lines: what was made, what to run next."""
    return f"""
StepOutcome in {seconds:.0f} s: a GPT with held-out loss {loss:.3f} (unigram entropy {entropy:.3f}), saved in {CHECKPOINTS}
See its loss curve, {CURVE}, and each step's output in {LOGS}
Sample: .venv/bin/python tools/generate_text.py --checkpoint {CHECKPOINTS} --prompt "import"
Train longer: PATH=.venv/bin:$PATH deepspeed --num_gpus {RANKS} pretrain_gpt.py --config {CONFIG} --set training.steps=1000
On GPUs: bash examples/single_node.sh 8 configs/125M.json, on many nodes sbatch examples/slurm/pretrain.sbatch"""


def read_documents(text: Path | None) -> list[str]:
    """The documents to train on, at most MAX_CHARACTERS in all, in an order that mixes their sources.

    Mixed, because the split takes the first documents for training and the last for evaluation. Raises DataError.
    """
    if text is None:
        documents = list(read_folder(Path(sysconfig.get_path("stdlib")), "*.py", skipped=TESTS | TABLES))
    elif text.is_dir():
        documents = list(read_folder(text, "*", skipped=frozenset({"__pycache__", ".git"})))
    elif text.is_file():
        documents = [read_text(text)]
    else:
        raise DataError(f"TEXT={text}: no such file or folder")
    characters = sum(map(len, documents))
    if characters < MIN_CHARACTERS:
        source = text or sysconfig.get_path("stdlib")
        raise DataError(f"{source}: {characters:,} characters of UTF-8 text; at least {MIN_CHARACTERS:,} are needed")
    if len(documents) < MIN_DOCUMENTS:
        length = characters // MIN_DOCUMENTS
        documents = [piece for document in documents for piece in cut(document, length)]
    random.Random(0).shuffle(documents)
    return documents


def read_folder(folder: Path, pattern: str, skipped: frozenset[str]) -> Iterator[str]:
    """The texts of the files that match, in a fixed mixed order, until MAX_CHARACTERS; files that are no text are left out."""
    paths = sorted(path for path in folder.rglob(pattern) if not skipped & set(path.relative_to(folder).parts))
    random.Random(0).shuffle(paths)
    characters = 0
    for path in paths:
        text = read_text(path) if path.is_file() else ""
        characters += len(text)
        if characters > MAX_CHARACTERS:
            return
        if text:
            yield text


def read_text(path: Path) -> str:
    """At most MAX_CHARACTERS of a file; nothing if it is not UTF-8 text or cannot be read."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CHARACTERS)
        text = codecs.getincrementaldecoder("utf-8")().decode(raw)  # incremental: the end may fall within a character
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if "\0" in text else text


def cut(text: str, length: int) -> Iterator[str]:
    """Pieces of whole lines, each of at least `length` characters but the last."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + length) + 1 or len(text)
        yield text[start:end]
        start = end


def prepare_folder(documents: list[str]) -> bool:
    """Empty runs/quickstart and write the documents there; True if it holds the tokens of the same documents already."""
    kept = FINGERPRINT.exists() and FINGERPRINT.read_text() == fingerprint(documents)
    for path in FOLDER.glob("*"):
        if path == DATA and kept:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    LOGS.mkdir(parents=True)
    if kept:
        say(f"The text has not changed since the last run: its tokens in {DATA} are used again")
        return True
    SOURCES.mkdir(parents=True)
    for number, document in enumerate(documents):
        (SOURCES / f"{number:05d}.txt").write_text(document, encoding="utf-8")
    say(f"Text: {len(documents):,} documents of {sum(map(len, documents)):,} characters in all")
    return False


def fingerprint(documents: list[str]) -> str:
    """Equal for two runs exactly when their tokens are."""
    digest = hashlib.sha256(f"{__version__} {VOCABULARY}".encode())
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()


def unigram_entropy(prefix: Path) -> tuple[int, float]:
    """How many tokens the corpus has, and the entropy of their frequencies, nats per token.

    No model that ignores the context can have a lower loss on these tokens (Shannon 1948).
    """
    corpus = IndexedCorpus(prefix)
    tokens = np.concatenate([corpus.read(sequence, 0, int(size)) for sequence, size in enumerate(corpus.sizes)])
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return len(tokens), float(-(shares * np.log(shares)).sum())


def last_eval_loss(metrics: Path) -> float:
    """The held-out loss of the last evaluation, nats per token. Raises StepError where there is none."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    if not losses:
        raise StepError(f"{metrics}: no line with eval_loss; the training has not evaluated")
    return float(losses[-1])


def run(title: str, command: str, *, live: bool = False) -> None:
    """Run one command; its output goes to a log file named after its script, and to the console if `live`.

    Raises StepError, after printing the end of its output, where it fails.
    """
    words = shlex.split(command)
    log = LOGS / next(f"{Path(word).stem}.log" for word in words if word.endswith(".py"))
    say(f"{title}: {command}")
    last = deque[str](maxlen=40)
    with (
        log.open("w") as file,
        subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            last.append(line)
            if live:
                print(f"    {line}", end="", flush=True)
    if process.returncode == 0:
        return
    if not live:
        print("".join(last), end="", file=sys.stderr)
    raise StepError(f"{title!r} failed with exit code {process.returncode}; all its output: {log}")


def environment() -> dict[str, str]:
    """The caller's, with this interpreter's commands first on PATH, and all ranks on the CPU, one thread each."""
    scripts = sysconfig.get_path("scripts")
    return {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
            "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}  # fmt: skip


def say(line: str) -> None:
    """Print at once, so that the line stands before the output of the step that it announces."""
    print(line, flush=True)
