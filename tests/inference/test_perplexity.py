"""Perplexity per token, word and byte, by its definition, from texts and from token files, on any ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pool import Pool
from support.runs import create_topology, tiny_config
from support.server import POSITIONS, byte_model

from megagpt.data.indexed import IndexedWriter
from megagpt.data.tokenizer import ByteTokenizer
from megagpt.errors import DataError
from megagpt.inference.perplexity import documents_of, measure
from megagpt.inference.source import TrainedModel, open_source
from megagpt.parallel.deferred_gradients import DeferredGradients
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.progress import NoProgress

TEXTS = ["The café is  open.\n", "x", "word " * 60, "東京"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and TEXTS as text files and as a pair; one document of the pair has no end-of-document token."""
    folder = tmp_path_factory.mktemp("evaluated")
    byte_model(folder / "run")
    (folder / "texts").mkdir()
    with IndexedWriter(folder / "corpus", np.dtype(np.uint16)) as writer:
        for number, text in enumerate(TEXTS):
            (folder / "texts" / f"{number}.txt").write_text(text)
            writer.add_document(np.array([*text.encode(), *([256] if number else [])]))
    return folder


def load(folder: Path, parallel: ParallelContext | None = None) -> TrainedModel:
    return open_source(str(folder / "run")).load("cpu", "fp32", False, NoProgress(), parallel or ParallelContext())


@torch.no_grad()
def test_the_numbers_follow_their_definitions(folder: Path) -> None:
    """Each token from the last 128 tokens at most, in windows that move by 50. fp32 logits: 1e-6 of the sum."""
    trained = load(folder)
    loss = 0.0
    for text in TEXTS:
        tokens = [256, *text.encode()]
        for position in range(1, len(tokens)):
            end = POSITIONS if position <= POSITIONS else POSITIONS + -(-(position - POSITIONS) // 50) * 50
            end = min(end, len(tokens) - 1)
            first = max(0, end - POSITIONS)
            logits = trained.model.logits(torch.tensor([tokens[first:position]]))[0, -1].double()
            loss -= float(logits.log_softmax(-1)[tokens[position]])
    report = measure(trained, documents_of(str(folder / "texts"), trained.tokenizer), stride=50).report()
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (report["documents"], report["tokens"], report["bytes"], report["words"]) == (4, n_bytes, n_bytes, 4 + 1 + 60 + 1)
    assert report["loss"] == pytest.approx(loss, rel=1e-6)
    assert report["token_perplexity"] == pytest.approx(math.exp(loss / n_bytes), rel=1e-5)
    assert report["word_perplexity"] == pytest.approx(math.exp(loss / 66), rel=1e-4)
    assert report["bits_per_byte"] == pytest.approx(loss / n_bytes / math.log(2), rel=1e-5)


@pytest.mark.parametrize("name", ["corpus", "corpus.bin", "corpus.idx"])
def test_a_token_file_has_the_numbers_of_its_texts(name: str, folder: Path) -> None:
    trained = load(folder)
    of_texts = measure(trained, documents_of(str(folder / "texts"), trained.tokenizer), 64)
    of_tokens = measure(trained, documents_of(str(folder / name), trained.tokenizer), 64)
    assert vars(of_tokens) == pytest.approx(vars(of_texts))


def test_data_that_is_not_there_is_an_error() -> None:
    with pytest.raises(DataError, match="no such file, folder or match"):
        next(documents_of("nowhere", ByteTokenizer()))


def measure_on_ranks(folder: Path) -> dict[str, float]:
    topology = create_topology(tiny_config(parallel={"tensor": 2}))
    trained = load(folder, ParallelContext.of(topology, False, DeferredGradients()))
    documents = list(documents_of(str(folder / "corpus"), trained.tokenizer))
    return vars(measure(trained, documents[topology.dp_rank :: 2], 64))


def test_ranks_share_the_documents_and_the_model(folder: Path, ranks: Pool) -> None:
    """Tensor 2 x data 2: the sums of the two replicas are those of one process."""
    trained = load(folder)
    expected = vars(measure(trained, documents_of(str(folder / "corpus"), trained.tokenizer), 64))
    results = ranks.run(4, measure_on_ranks, folder)
    assert results[0] == results[1] and results[2] == results[3]
    assert {name: results[0][name] + results[2][name] for name in expected} == pytest.approx(expected, rel=1e-6)
