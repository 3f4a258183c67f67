"""Document starts, from the corpus to the step: what the model gets, and the same losses under every layout.

Tolerances as in test_layouts.py.
"""

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from support.exhaustive import chosen
from support.pool import Pool
from support.runs import Tree, corpus, full_model, full_weights, run_trainer, tiny_config

from megagpt.config import Config
from megagpt.data.blend import build_datasets
from megagpt.data.indexed import IndexedWriter
from megagpt.model.forward_context import MicroBatch
from megagpt.parallel.topology import Layout, Topology
from megagpt.training.micro_batches import global_batches, to_host_batch

ALL: Tree = {"reset_positions": True, "reset_attention": True, "mask_document_ends": True}
RESULT_OF_KEY = {"reset_positions": "positions", "reset_attention": "documents", "mask_document_ends": "labels"}
"""The tensor of a micro-batch that each key changes."""


def run_config(folder: Path, data: Tree, steps: int = 4, **sections: Tree) -> Config:
    """Return the config of a short run on the corpus in `folder`."""
    return tiny_config(
        data={"train": str(folder / "corpus"), **data},
        logging={"interval": 1, "metrics_file": str(folder / "metrics.jsonl")},
        **{**sections, "training": {"steps": steps, "global_batch_size": 8, **sections.get("training", {})}},
    )


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A corpus in which every token occurs once, and the document of each token."""
    folder = tmp_path_factory.mktemp("numbered")
    sizes = np.random.default_rng(1).choice([1, 1, 2, 5, 30], 60)
    with IndexedWriter(folder / "corpus", np.dtype(np.uint16)) as writer:
        writer.add_documents(np.arange(sizes.sum()).astype(np.uint16), sizes)
    return folder, [document for document, size in enumerate(sizes) for _ in range(size)]


def read_batches(folder: Path, data: Tree, topology: Topology, steps: int = 5) -> list[MicroBatch]:
    """Return this rank's micro-batches of the first global batches."""
    config = run_config(folder, data, model={"vocab_size": 1000})
    batches = global_batches(build_datasets(config.data, config.model.n_positions).train, config, topology, 2)
    micro_batches: list[MicroBatch] = []
    for step in range(steps):
        host_batch = to_host_batch(batches.micro_batches(8 * step), config, topology)
        micro_batches += host_batch.to(torch.device("cpu"))
    return micro_batches


def test_labels_positions_and_documents_restart_where_the_corpus_has_a_document_start(
    numbered: tuple[Path, list[int]],
) -> None:
    folder, document_of = numbered
    plain, masked = (read_batches(folder, data, Topology()) for data in ({}, ALL))
    lengths, starts_in_the_middle = set(), 0
    for before, batch in zip(plain, masked, strict=True):
        assert before.positions is None and before.documents is None and (before.labels != -100).all()
        assert torch.equal(batch.tokens, before.tokens) and torch.equal(batch.samples, before.samples)
        for row in range(2):
            tokens, following = before.tokens[row].tolist(), before.labels[row].tolist()
            pairs = list(zip(tokens, following, strict=True))
            labels = [label if document_of[token] == document_of[label] else -100 for token, label in pairs]
            assert batch.labels[row].tolist() == labels
            pieces = [list(piece) for _, piece in groupby(tokens, key=lambda token: document_of[token])]
            assert batch.positions[row].tolist() == [position for piece in pieces for position in range(len(piece))]
            documents = batch.documents[row]
            same = torch.tensor([[document_of[a] == document_of[b] for a in tokens] for b in tokens])
            assert torch.equal(documents[:, None] == documents[None, :], same)
            lengths |= {len(piece) for piece in pieces[1:-1]}
            starts_in_the_middle += tokens[0] > 0 and document_of[tokens[0] - 1] == document_of[tokens[0]]
    assert 1 in lengths and 5 in lengths  # documents of one token are among them
    assert starts_in_the_middle > 3  # and samples that start in the middle of a document


@pytest.mark.parametrize("key", ALL)
def test_each_key_has_its_own_effect_alone(key: str, numbered: tuple[Path, list[int]]) -> None:
    together, alone = (read_batches(numbered[0], data, Topology(), 1)[0] for data in (ALL, {key: True}))
    assert (alone.positions is not None, alone.documents is not None, bool((alone.labels == -100).any())) == (
        key == "reset_positions",
        key == "reset_attention",
        key == "mask_document_ends",
    )
    assert torch.equal(getattr(alone, RESULT_OF_KEY[key]), getattr(together, RESULT_OF_KEY[key]))


def test_data_parallel_ranks_read_their_shares_with_the_same_masks(numbered: tuple[Path, list[int]]) -> None:
    full = read_batches(numbered[0], ALL, Topology(), 1)
    shares = [read_batches(numbered[0], ALL, Topology(Layout(data=2), rank), 1) for rank in range(2)]
    for batch, expected in zip([batch for share in shares for batch in share], full, strict=True):
        for name in ("tokens", "labels", "positions", "documents"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)), name


@pytest.fixture(scope="module")
def reference(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tree]]:
    """The folder of a corpus, and the results of one process on it."""
    folder = tmp_path_factory.mktemp("reference")
    corpus(folder)
    results = ranks.run(1, run_trainer, run_config(folder, ALL))
    return folder, results


def test_the_first_loss_is_the_mean_over_documents_alone(reference: tuple[Path, list[Tree]]) -> None:
    folder, results = reference
    config = run_config(folder, ALL)
    train = build_datasets(config.data, config.model.n_positions).train
    model = full_model(config)
    total, count = 0.0, 0
    for sample in map(train.sample, range(8)):
        for document in np.split(sample.tokens, np.flatnonzero(sample.starts)):
            if len(document) < 2:  # also the empty piece before a start at the first token
                continue
            tokens = torch.from_numpy(document).unsqueeze(0)
            with torch.no_grad():
                total += float(model(None, MicroBatch(tokens[:, :-1], tokens[:, 1:])))
            count += len(document) - 1
    assert results[0]["losses"][0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("key", ALL)
def test_every_key_changes_the_loss(key: str, reference: tuple[Path, list[Tree]], ranks: Pool) -> None:
    folder, results = reference
    (without,) = ranks.run(1, run_trainer, run_config(folder, {**ALL, key: False}, steps=1))
    assert abs(without["losses"][0] - results[0]["losses"][0]) > 1e-3


LAYOUTS: dict[str, tuple[int, Tree]] = {
    "tensor 2, sequence parallel": (2, {"parallel": {"tensor": 2, "sequence_parallel": True}}),
    "pipeline 2": (2, {"parallel": {"pipeline": 2}}),
    "data 2": (2, {}),
    "data 2, ZeRO-3": (2, {"zero": {"stage": 3}}),
    "full recompute": (1, {"training": {"recompute": "full"}}),
    "selective recompute": (1, {"training": {"recompute": "selective"}}),
    "2 x 2 x 2, sequence parallel, full recompute": (
        8,
        {"parallel": {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, "training": {"recompute": "full"}},
    ),
}


USUAL = ("tensor 2, sequence parallel", "data 2, ZeRO-3", "selective recompute", "2 x 2 x 2, sequence parallel, full recompute")


@pytest.mark.parametrize("name", chosen(LAYOUTS, *USUAL))
def test_every_layout_trains_as_one_process_does(
    name: str, reference: tuple[Path, list[Tree]], ranks: Pool, tmp_path: Path
) -> None:
    world, sections = LAYOUTS[name]
    folder, expected = reference
    config = run_config(tmp_path, {**ALL, "train": str(folder / "corpus")}, **sections)
    results = ranks.run(world, run_trainer, config)
    for key in ("loss", "grad_norm"):
        values = [record[key] for record in results[0]["records"]]
        assert values == pytest.approx([record[key] for record in expected[0]["records"]], rel=1e-5)
    weights = full_weights(results)
    for parameter, values in full_weights(expected).items():
        torch.testing.assert_close(weights[parameter], values, rtol=0, atol=5e-6)


def test_an_evaluation_has_the_same_masks(reference: tuple[Path, list[Tree]], ranks: Pool, tmp_path: Path) -> None:
    folder, expected = reference
    prefix = str(folder / "corpus")
    no_change: Tree = {"learning_rate": 1e-20, "weight_decay": 0.0}  # so that the evaluation has the first step's weights
    config = run_config(tmp_path, {**ALL, "train": prefix, "valid": prefix}, 1, optimizer=no_change, evaluation={"samples": 8})
    (result,) = ranks.run(1, run_trainer, config)
    (loss,) = [record["eval_loss"] for record in result["records"] if "eval_loss" in record]
    assert loss == pytest.approx(expected[0]["losses"][0], rel=1e-5)
