"""Where documents begin, from the corpus to the step: what the model is told of it, and the same losses in every layout.

Tolerances as in test_layouts.py.
"""

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pool import Pool
from support.runs import Tree, corpus, run_trainer, tiny_config, full_weights

from megagpt.config import Config
from megagpt.data.blend import build_datasets
from megagpt.data.indexed import IndexedWriter
from megagpt.model.gpt import MicroBatch, build_chunk
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.parameter import ParallelContext
from megagpt.parallel.topology import Coordinates, Layout, Topology
from megagpt.training.micro_batches import global_batches, to_micro_batches

ALL: Tree = {"reset_positions": True, "reset_attention": True, "mask_document_ends": True}
CPU = torch.device("cpu")


def config_of(folder: Path, data: Tree, steps: int = 4, **sections: Tree) -> Config:
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


def read(folder: Path, data: Tree, topology: Topology, steps: int = 5) -> list[MicroBatch]:
    """Micro-batches of the first global batches."""
    config = config_of(folder, data, model={"vocab_size": 1000})
    batches = global_batches(build_datasets(config.data, config.model.n_positions).train, config, topology, 2)
    return [found for step in range(steps) for found in to_micro_batches(batches.at(8 * step), config, topology, step, CPU)]


def test_labels_positions_and_documents_begin_anew_where_the_corpus_says(numbered: tuple[Path, list[int]]) -> None:
    folder, document_of = numbered
    plain, masked = (read(folder, data, Topology.single()) for data in ({}, ALL))
    lengths, middles = set(), 0
    for before, batch in zip(plain, masked, strict=True):
        assert before.positions is None and before.documents is None and (before.labels != -100).all()
        assert torch.equal(batch.tokens, before.tokens) and batch.seed == before.seed
        for row in range(2):
            tokens, following = before.tokens[row].tolist(), before.labels[row].tolist()
            pairs = list(zip(tokens, following, strict=True))
            kept = [label if document_of[token] == document_of[label] else -100 for token, label in pairs]
            assert batch.labels[row].tolist() == kept
            pieces = [list(piece) for _, piece in groupby(tokens, key=lambda token: document_of[token])]
            assert batch.positions[row].tolist() == [place for piece in pieces for place in range(len(piece))]
            numbers = batch.documents[row]
            same = torch.tensor([[document_of[a] == document_of[b] for a in tokens] for b in tokens])
            assert torch.equal(numbers[:, None] == numbers[None, :], same)
            lengths |= {len(piece) for piece in pieces[1:-1]}
            middles += tokens[0] > 0 and document_of[tokens[0] - 1] == document_of[tokens[0]]
    assert 1 in lengths and 5 in lengths and middles > 3  # documents of one token, samples from the middle of one


@pytest.mark.parametrize("key", ALL)
def test_each_key_does_its_own_part_alone(key: str, numbered: tuple[Path, list[int]]) -> None:
    whole, one = (read(numbered[0], data, Topology.single(), 1)[0] for data in (ALL, {key: True}))
    assert (one.positions is not None, one.documents is not None, bool((one.labels == -100).any())) == (
        key == "reset_positions",
        key == "reset_attention",
        key == "mask_document_ends",
    )
    made: Tree = {"reset_positions": "positions", "reset_attention": "documents", "mask_document_ends": "labels"}
    assert torch.equal(getattr(one, made[key]), getattr(whole, made[key]))


def test_data_ranks_read_their_parts_with_the_same_masks(numbered: tuple[Path, list[int]]) -> None:
    whole = read(numbered[0], ALL, Topology.single(), 1)
    parts = [read(numbered[0], ALL, Topology(Layout(data=2), rank, Coordinates(0, rank, 0)), 1) for rank in range(2)]
    for batch, expected in zip([batch for part in parts for batch in part], whole, strict=True):
        for name in ("tokens", "labels", "positions", "documents"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)), name


@pytest.fixture(scope="module")
def reference(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tree]]:
    """A corpus's folder and what one process makes of it."""
    folder = tmp_path_factory.mktemp("reference")
    corpus(folder)
    results = ranks.run(1, run_trainer, config_of(folder, ALL))
    return folder, results


def test_the_first_loss_is_the_mean_over_documents_alone(reference: tuple[Path, list[Tree]]) -> None:
    folder, results = reference
    config = config_of(folder, ALL)
    train = build_datasets(config.data, config.model.n_positions).train
    model = build_chunk(config, ParallelContext(DeferredGradients()), range(config.model.n_layer))
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
def test_without_any_of_the_keys_the_losses_are_others(key: str, reference: tuple[Path, list[Tree]], ranks: Pool) -> None:
    folder, results = reference
    (without,) = ranks.run(1, run_trainer, config_of(folder, {**ALL, key: False}, steps=1))
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


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_equals_one_process(name: str, reference: tuple[Path, list[Tree]], ranks: Pool, tmp_path: Path) -> None:
    world, sections = LAYOUTS[name]
    folder, expected = reference
    config = config_of(tmp_path, {**ALL, "train": str(folder / "corpus")}, **sections)
    results = ranks.run(world, run_trainer, config)
    for key in ("loss", "grad_norm"):
        wanted = [record[key] for record in expected[0]["records"]]
        assert [record[key] for record in results[0]["records"]] == pytest.approx(wanted, rel=1e-5)
    weights = full_weights(results)
    for parameter, values in full_weights(expected).items():
        torch.testing.assert_close(weights[parameter], values, rtol=0, atol=5e-6)


def test_evaluation_has_the_same_masks(reference: tuple[Path, list[Tree]], ranks: Pool, tmp_path: Path) -> None:
    folder, expected = reference
    prefix = str(folder / "corpus")
    still: Tree = {"learning_rate": 1e-20, "weight_decay": 0.0}  # so that evaluation sees the weights of the first step
    config = config_of(tmp_path, {**ALL, "train": prefix, "valid": prefix}, 1, optimizer=still, evaluation={"steps": 1})
    (result,) = ranks.run(1, run_trainer, config)
    (loss,) = [record["eval_loss"] for record in result["records"] if "eval_loss" in record]
    assert loss == pytest.approx(expected[0]["losses"][0], rel=1e-5)
