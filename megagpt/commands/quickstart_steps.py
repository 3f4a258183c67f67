"""The steps of a quickstart: commands that a user would type, and the folder that they write to."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megagpt import __version__
from megagpt.commands.train_tokenizer import vocab_size_for
from megagpt.data.indexed import IndexedCorpus
from megagpt.errors import MegagptError

MIN_VOCAB_SIZE = 3072
"""Size of the vocabulary, unless the text has so many different characters that it needs a larger one."""


class StepRunner(Protocol):
    """Runs one step."""

    def __call__(self, title: str, command: str, live: bool = False) -> None:
        """Run a command; show its output if `live`. Raises StepError if it fails."""


class StepError(MegagptError):
    """A step that failed, or a result that is not good enough."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a quickstart. Each run starts from scratch, but uses the tokens of the same text again."""

    path: Path

    @property
    def logs(self) -> Path:
        """Output of each step."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the training."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Metrics of the training."""
        return self.path / "metrics.jsonl"

    @property
    def loss_plot(self) -> Path:
        """Plot of the losses."""
        return self.path / "loss.png"

    @property
    def data(self) -> Path:
        """What is made of the text."""
        return self.path / "data"

    @property
    def text(self) -> Path:
        """The documents, one file each."""
        return self.data / "text"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, without its suffix .model."""
        return self.data / "tokenizer"

    @property
    def corpus(self) -> Path:
        """Prefix of the tokens, without the key of the JSON lines."""
        return self.data / "corpus"

    @property
    def text_hash(self) -> Path:
        """Written when the tokenizer and the tokens of the text are complete."""
        return self.data / "text_hash"

    def prepare(self, documents: list[str]) -> bool:
        """Empty the folder and write the documents there.

        Returns True, and keeps the tokenizer and the tokens, if those of the same documents are there already.
        """
        unchanged = self.text_hash.exists() and self.text_hash.read_text() == text_hash(documents)
        for path in self.path.glob("*"):
            if path == self.data and unchanged:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.logs.mkdir(parents=True)
        if unchanged:
            log(f"The text is the same as in the last run; using its tokens in {self.data}")
            return True
        self.text.mkdir(parents=True)
        for number, document in enumerate(documents):
            (self.text / f"{number:05d}.txt").write_text(document, encoding="utf-8")
        log(f"Text: {len(documents):,} documents, {sum(map(len, documents)):,} characters")
        return False

    def run(self, title: str, command: str, live: bool = False) -> None:
        """Run a command; its output goes to a log file named after its script, and also to the console if `live`.

        Raises StepError if the command fails, after the end of its output is printed.
        """
        words = shlex.split(command)
        script = next(Path(word) for word in words if word.endswith(".py"))
        log_file = self.logs / f"{script.stem}.log"
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


def make_tokens(folder: RunFolder, documents: list[str], run_step: StepRunner) -> None:
    """Train a tokenizer on the documents and convert them to tokens, unless the folder has those of the same documents."""
    if folder.prepare(documents):
        return
    run_step(
        "Train a tokenizer",
        f"python tools/train_tokenizer.py --input {folder.text} --output {folder.tokenizer} "
        f"--vocab-size {vocab_size_for(documents, MIN_VOCAB_SIZE)}",
    )
    run_step(
        "Convert the text to tokens",
        f"python tools/preprocess_data.py --input {folder.text} --tokenizer {folder.tokenizer}.model "
        f"--output-prefix {folder.corpus} --append-eod --workers 2",
    )
    folder.text_hash.write_text(text_hash(documents))


def text_hash(documents: list[str]) -> str:
    """Return a SHA-256 hash of all that the tokens depend on: the documents, the vocabulary size and megagpt's version."""
    digest = hashlib.sha256(f"{__version__} {MIN_VOCAB_SIZE}".encode())
    for document in documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()


def corpus_entropy(prefix: Path) -> tuple[int, float]:
    """Return the number of tokens of a corpus, and their unigram entropy."""
    corpus = IndexedCorpus(prefix)
    tokens = np.concatenate([corpus.read(sequence, 0, int(size)) for sequence, size in enumerate(corpus.sizes)])
    return len(tokens), unigram_entropy(tokens)


def unigram_entropy(tokens: npt.NDArray[np.integer]) -> float:
    """Return the entropy of the frequencies of tokens, in nats per token.

    No model that ignores the context can have a lower loss on these tokens (Shannon 1948).
    """
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-(shares * np.log(shares)).sum())


def last_eval_loss(metrics: Path) -> float:
    """Return the held-out loss of the last evaluation, in nats per token. Raises StepError if there is none."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    if not losses:
        raise StepError(f"{metrics}: no line with eval_loss; the training run has not evaluated")
    if losses[-1] is None:
        raise StepError(f"{metrics}: the last eval_loss is not a finite number")
    return float(losses[-1])


def learned_loss(metrics: Path, entropy: float, max_share: float) -> float:
    """Return the last held-out loss. Raises StepError if it is not below `max_share` of the unigram entropy."""
    loss = last_eval_loss(metrics)
    log(f"    held-out loss {loss:.3f} nats per token, unigram entropy {entropy:.3f}")
    if loss >= max_share * entropy:
        raise StepError(f"the held-out loss {loss:.3f} is not below {max_share:.0%} of the unigram entropy {entropy:.3f}")
    return loss


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
