"""The evaluation loss: the mean over the tokens of fixed batches, reduced like the training loss, under any layout."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exhaustive import chosen
from support.pool import Pool
from support.runs import Tree, corpus, full_model, local_weights, open_trainer, tiny_config

from megagpt.config import Config
from megagpt.data.blend import Blend, Dataset, build_datasets
from megagpt.data.indexed import IndexedCorpus
from megagpt.data.shuffle import count_samples
from megagpt.training.evaluation import evaluate, evaluated_samples
from megagpt.training.metrics import perplexity

LAYOUTS: dict[str, tuple[int, Tree, int]] = {
    "1 process": (1, {}, 1),
    "data 2, ZeRO-3": (2, {}, 3),
    "pipeline 2 x data 2": (4, {"pipeline": 2}, 1),
    "zbv": (2, {"pipeline": 2, "schedule": "zbv"}, 1),
    "tensor 2 x context 2": (4, {"tensor": 2, "context": 2}, 2),
}


def evaluation_config(data: str, name: str, **sections: Tree) -> Config:
    """Return the config of a layout, without dropout by default; the number of labels differs from batch to batch."""
    _, parallel, stage = LAYOUTS[name]
    tree: Tree = {
        "data": {"train": data, "mask_document_ends": True},
        "training": {"steps": 3, "micro_batch_size": 2, "global_batch_size": 8},
        "parallel": parallel,
        "zero": {"stage": stage},
    }
    return tiny_config(**{**tree, **sections})


def float64_loss(config: Config, dataset: Dataset, n_samples: int) -> float:
    """Return the mean loss over the unmasked tokens of the first samples, one by one in float64, from the logits."""
    model = full_model(config).double()
    total, tokens = 0.0, 0
    for index in range(n_samples):
        sample = dataset.sample(index)
        inputs, labels = torch.from_numpy(sample.tokens[:-1]), torch.from_numpy(sample.tokens[1:])
        counted = torch.from_numpy(~sample.starts[1:])
        with torch.no_grad():
            logits = model.logits(inputs.unsqueeze(0))[0]
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")[counted]
        total, tokens = total + losses.sum().item(), tokens + int(counted.sum())
    return total / tokens


def compare_with_training(config: Config) -> dict[str, Any]:
    """Evaluate the batches of the first two steps, train them at a learning rate of almost zero, and return the losses."""
    trainer = open_trainer(config)
    evaluations = [
        evaluate(trainer.engine, trainer.datasets.train, config, samples, "valid")["valid_loss"] for samples in (8, 16)
    ]
    with trainer.batches() as batches:
        outcomes = [trainer.train_step(batch, 1e-30) for _, batch in zip(range(2), batches, strict=False)]
    trainer.close()
    return {
        "evaluations": evaluations,
        "losses": [outcome.loss for outcome in outcomes],
        "tokens": [outcome.n_tokens for outcome in outcomes],
    }


USUAL = ("1 process", "data 2, ZeRO-3", "tensor 2 x context 2")


@pytest.mark.parametrize("name", chosen(LAYOUTS, *USUAL, "zbv"))
def test_the_evaluation_loss_equals_the_training_loss_of_the_same_batches(name: str, ranks: Pool, tmp_path: Path) -> None:
    data = corpus(tmp_path)
    single = ranks.run(1, compare_with_training, evaluation_config(data, "1 process"))[0]
    results = ranks.run(LAYOUTS[name][0], compare_with_training, evaluation_config(data, name))
    assert single["tokens"][0] != single["tokens"][1]
    for result in results:
        assert result == results[0]  # the same bits on all ranks
        assert result["tokens"] == single["tokens"]
        assert result["evaluations"][0] == result["losses"][0]  # the same bits
        (first, second), (n_first, n_second) = result["losses"], result["tokens"]
        mean = (first * n_first + second * n_second) / (n_first + n_second)
        assert result["evaluations"][1] == pytest.approx(mean, rel=1e-6)
        assert result["evaluations"] == pytest.approx(single["evaluations"], rel=1e-6)


def losses_of(config: Config, samples: list[int | None]) -> list[float]:
    """Return the evaluation loss of each number of samples, with the initial weights."""
    trainer = open_trainer(config)
    losses = [evaluate(trainer.engine, trainer.datasets.train, config, number)["eval_loss"] for number in samples]
    trainer.close()
    return losses


@pytest.mark.parametrize("name", chosen(LAYOUTS, *USUAL, "pipeline 2 x data 2"))
def test_the_loss_is_the_exact_mean_over_the_first_samples(name: str, ranks: Pool, tmp_path: Path) -> None:
    """For one sample, a part of a batch, a batch and a part, and all samples: 3e-6 is the error of fp32 sums."""
    config = evaluation_config(corpus(tmp_path), name)
    dataset = build_datasets(config.data, config.model.n_positions).train
    numbers = [1, 5, 11, None]
    expected = [float64_loss(config, dataset, number or dataset.samples_per_epoch) for number in numbers]
    for losses in ranks.run(LAYOUTS[name][0], losses_of, config, numbers):
        assert losses == pytest.approx(expected, rel=3e-6)


@pytest.mark.parametrize("sizes", [(8, 1, None), (8, 4, 2), (2, 2, None), (40, 4, None)])
def test_batch_sizes_do_not_change_the_loss(sizes: tuple[int, int, int | None], ranks: Pool, tmp_path: Path) -> None:
    global_batch, micro_batch, evaluation_micro_batch = sizes
    config = evaluation_config(
        corpus(tmp_path),
        "1 process",
        training={"steps": 3, "global_batch_size": global_batch, "micro_batch_size": micro_batch},
        evaluation={"micro_batch_size": evaluation_micro_batch},
    )
    dataset = build_datasets(config.data, config.model.n_positions).train
    (loss,) = ranks.run(1, losses_of, config, [11])[0]
    assert loss == pytest.approx(float64_loss(config, dataset, 11), rel=3e-6)


def test_more_samples_than_the_data_has_are_all_samples_once(ranks: Pool, tmp_path: Path) -> None:
    limited, everything = ranks.run(1, losses_of, evaluation_config(corpus(tmp_path), "1 process"), [10**15, None])[0]
    assert limited == everything


def test_all_samples_of_a_blend_are_those_before_the_first_corpus_starts_again(tmp_path: Path) -> None:
    prefixes = [corpus(tmp_path / name, documents) for name, documents in (("a", 60), ("b", 20))]
    data = {"train": {prefixes[0]: 0.25, prefixes[1]: 0.75}}
    blend = build_datasets(tiny_config(data=data).data, 16).train
    available = evaluated_samples(blend, None)
    seen = [blend.sample(index).tokens.tobytes() for index in range(available)]
    assert len(set(seen)) == available
    assert evaluated_samples(blend, available + 5) == available and evaluated_samples(blend, 3) == 3
    short = count_samples(IndexedCorpus(prefixes[1]).n_tokens, 16)
    assert isinstance(blend, Blend)
    assert blend.samples_of_each(available)[1] <= short < blend.samples_of_each(available + 2)[1]


def evaluate_twice(config: Config) -> tuple[list[Tree], bool]:
    """Evaluate twice; return both results, and whether the weights changed."""
    trainer = open_trainer(config)
    before = local_weights(trainer.engine)
    results = [evaluate(trainer.engine, trainer.datasets.train, config, config.evaluation.samples) for _ in range(2)]
    after = local_weights(trainer.engine)
    trainer.close()
    changed = any((one[-1] != other[-1]).any() for one, other in zip(before, after, strict=True))
    return results, changed


def test_an_evaluation_changes_nothing_and_has_no_dropout(ranks: Pool, tmp_path: Path) -> None:
    dropout: Tree = {"model": {"embd_pdrop": 0.5, "resid_pdrop": 0.5, "attn_pdrop": 0.5}, "evaluation": {"samples": 16}}
    config = evaluation_config(corpus(tmp_path), "1 process", **dropout)
    ((first, second), changed) = ranks.run(1, evaluate_twice, config)[0]
    assert first == second and not changed
    without = evaluation_config(corpus(tmp_path), "1 process", evaluation={"samples": 16})
    assert ranks.run(1, evaluate_twice, without)[0][0][0] == first


def test_the_micro_batch_size_of_the_evaluation_does_not_change_the_loss(ranks: Pool, tmp_path: Path) -> None:
    data = corpus(tmp_path)
    losses = []
    for size in (None, 1, 4):
        config = evaluation_config(data, "pipeline 2 x data 2", evaluation={"samples": 16, "micro_batch_size": size})
        losses.append(ranks.run(4, evaluate_twice, config)[0][0][0]["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_the_perplexity_is_the_exponential_of_the_loss(ranks: Pool, tmp_path: Path) -> None:
    config = evaluation_config(corpus(tmp_path), "1 process", evaluation={"samples": 8})
    result = ranks.run(1, evaluate_twice, config)[0][0][0]
    assert result.keys() == {"eval_loss", "eval_perplexity"}
    assert result["eval_perplexity"] == math.exp(result["eval_loss"])


def test_a_perplexity_too_large_for_a_number_is_infinite() -> None:
    assert perplexity(2.0) == math.exp(2.0)
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan))
