"""finetune_classifier.py: from a pretrained checkpoint and labelled lines to an accuracy and a confusion matrix."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from support.job import Job
from support.pool import Pool
from support.runs import run_trainer, tiny_config

from megagpt.commands import convert_checkpoint, finetune_classifier
from megagpt.data.indexed import IndexedWriter


@pytest.fixture(scope="module")
def pretrained(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    with IndexedWriter(folder / "x", np.uint16) as writer:
        writer.add_document(np.frombuffer(b"the quick brown fox jumps over the lazy dog " * 50, np.uint8))
    config = tiny_config(
        model={"vocab_size": 257, "n_positions": 32, "n_layer": 1},
        data={"train": str(folder / "x"), "tokenizer": "byte"},
        training={"steps": 2, "global_batch_size": 4},
        checkpoint={"dir": str(folder / "checkpoints")},
    )
    ranks.run(1, run_trainer, config)
    return folder / "checkpoints"


def labelled(path: Path, n: int, seed: int) -> Path:
    """Write texts whose class is their last letter."""
    generator = random.Random(seed)
    with path.open("w") as file:
        for _ in range(n):
            text = "".join(generator.choices("xyz", k=generator.randint(1, 12)))
            file.write(json.dumps({"text": text, "label": {"x": "first", "y": "second", "z": "third"}[text[-1]]}) + "\n")
    return path


def arguments(pretrained: Path, folder: Path, output: str = "out") -> list[str]:
    train, valid = labelled(folder / "train.jsonl", 240, 1), labelled(folder / "valid.jsonl", 60, 2)
    paths = ["--train", str(train), "--valid", str(valid), "--output", str(folder / output)]
    return ["--checkpoint", str(pretrained), *paths, "--epochs", "6", "--batch-size", "4", "--learning-rate", "1e-2"]


def test_two_ranks_learn_the_classes_and_print_the_confusion_matrix(pretrained: Path, tmp_path: Path) -> None:
    options = arguments(pretrained, tmp_path)
    job = Job(2, options, tmp_path / "logs", command="finetune_classifier")
    assert job.finish(120) == [0, 0], job.output()
    lines = job.output().splitlines()
    start = lines.index("confusion matrix: a row for each class, a column for each predicted class")
    assert lines[start + 1].split() == ["first", "second", "third"]
    matrix = np.array([[int(count) for count in line.split()[1:]] for line in lines[start + 2 : start + 5]])
    classes = [json.loads(line)["label"] for line in (tmp_path / "valid.jsonl").read_text().splitlines()]
    assert matrix.sum(1).tolist() == [classes.count(name) for name in ("first", "second", "third")]
    accuracy = matrix.trace() / matrix.sum()
    assert accuracy > 0.9 and f"accuracy {accuracy:.1%} on 60 texts" in job.output()
    assert convert_checkpoint.main(["to-hf", str(tmp_path / "out" / "checkpoints"), "--output", str(tmp_path / "hf")]) == 2


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        ("", 'train.jsonl: has no example; expected JSON lines such as {"text": "...", "label": "..."}'),
        ('{"text": "a"}\n', 'train.jsonl:1: expected a text or an integer under "label"'),
        ('{"label": 3}\n', 'train.jsonl:1: expected a text under "text"'),
        ("[]\n", "train.jsonl:1: expected a JSON object, found a list"),
        ('{"text": "a", "label": 1}\n', "the training data has 1 classes; expected 2 to 60,000"),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n', "example 1: the class 'third' is not in the training data"),
    ],
)
def test_wrong_examples_are_refused_in_one_line(
    train: str, problem: str, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = arguments(pretrained, tmp_path)
    (tmp_path / "train.jsonl").write_text(train)
    (tmp_path / "valid.jsonl").write_text('{"text": "z", "label": "third"}\n')
    assert finetune_classifier.main(options) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1
