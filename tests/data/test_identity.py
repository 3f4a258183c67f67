"""The identity of a run's data: equal for copies, different for anything that changes what a sample number means."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.runs import Tree, corpus, tiny_config

from megagpt.data.identity import DataIdentity, data_identity, training_data_changes
from megagpt.data.indexed import IndexedWriter


def identity(length: int = 16, **data: object) -> DataIdentity:
    tree: Tree = dict(data)
    return data_identity(tiny_config(data=tree).data, length)


def copied(folder: Path, prefix: str) -> str:
    """Copy a pair to `folder`; return its prefix there."""
    folder.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(prefix + suffix, folder / f"corpus{suffix}")
    return str(folder / "corpus")


def test_a_copy_in_another_folder_is_the_same_data(tmp_path: Path) -> None:
    prefix = corpus(tmp_path)
    assert training_data_changes(identity(train=prefix), identity(train=copied(tmp_path / "copy", prefix))) == []


def test_one_other_token_is_other_data(tmp_path: Path) -> None:
    for folder, token in (("a", 5), ("b", 6)):
        (tmp_path / folder).mkdir()
        with IndexedWriter(tmp_path / folder / "c", np.dtype(np.uint16)) as writer:
            writer.add_documents(np.array([1, 2, 3, token], np.uint16), np.array([4]))
    first, second = str(tmp_path / "a" / "c"), str(tmp_path / "b" / "c")
    assert training_data_changes(identity(train=first), identity(train=second)) == [
        f"data.train was {first} (1 sequences, 4 tokens) and is {second} (1 sequences, 4 tokens)"
    ]


@pytest.mark.parametrize(
    ("changed", "length", "clause"),
    [
        ({"seed": 2}, 16, "data.seed was 1 and is 2"),
        ({"split": "80,10,10"}, 16, "data.split was 90,5,5 and is 80,10,10"),
        ({}, 8, "model.n_positions was 16 and is 8"),
    ],
)
def test_what_changes_the_order_of_samples_is_named(changed: Tree, length: int, clause: str, tmp_path: Path) -> None:
    data: Tree = {"paths": corpus(tmp_path), "split": "90,5,5", "seed": 1}
    assert training_data_changes(identity(**data), identity(length, **{**data, **changed})) == [clause]


def test_other_weights_of_a_blend_and_other_validation_data_are_told_apart(tmp_path: Path) -> None:
    first = corpus(tmp_path)
    second = copied(tmp_path / "copy", first)
    before = identity(train={first: 0.5, second: 0.5}, valid=first)
    assert training_data_changes(before, identity(train={first: 0.5, second: 0.5}, valid=None)) == []
    (change,) = training_data_changes(before, identity(train={first: 0.7, second: 0.3}, valid=first))
    assert "x 0.5" in change and "x 0.7" in change
