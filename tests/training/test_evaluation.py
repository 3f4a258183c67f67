"""The evaluation loss: the mean over the tokens of fixed batches, reduced like the training loss, under any layout."""

import math
from pathlib import Path
from typing import Any

import pytest
from support.pool import Pool
from support.runs import Tree, corpus, local_weights, open_trainer, tiny_config

from megagpt.config import Config
from megagpt.training.evaluation import evaluate, perplexity

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


def compare_with_training(config: Config) -> dict[str, Any]:
    """Evaluate the batches of the first two steps, train them at a learning rate of almost zero, and return the losses."""
    trainer = open_trainer(config)
    evaluations = [
        evaluate(trainer.engine, trainer.datasets.train, with_steps(config, steps), "valid")["valid_loss"] for steps in (1, 2)
    ]
    with trainer.batches() as batches:
        outcomes = [trainer.train_step(batch, 1e-30) for _, batch in zip(range(2), batches, strict=False)]
    trainer.close()
    return {
        "evaluations": evaluations,
        "losses": [outcome.loss for outcome in outcomes],
        "tokens": [outcome.n_tokens for outcome in outcomes],
    }


def with_steps(config: Config, steps: int) -> Config:
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"steps": steps})})


@pytest.mark.parametrize("name", LAYOUTS)
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


def evaluate_twice(config: Config) -> tuple[list[Tree], bool]:
    """Evaluate twice; return both results, and whether the weights changed."""
    trainer = open_trainer(config)
    before = local_weights(trainer.engine)
    results = [evaluate(trainer.engine, trainer.datasets.train, config) for _ in range(2)]
    after = local_weights(trainer.engine)
    trainer.close()
    changed = any((one[-1] != other[-1]).any() for one, other in zip(before, after, strict=True))
    return results, changed


def test_an_evaluation_changes_nothing_and_has_no_dropout(ranks: Pool, tmp_path: Path) -> None:
    dropout: Tree = {"model": {"embd_pdrop": 0.5, "resid_pdrop": 0.5, "attn_pdrop": 0.5}, "evaluation": {"steps": 2}}
    config = evaluation_config(corpus(tmp_path), "1 process", **dropout)
    ((first, second), changed) = ranks.run(1, evaluate_twice, config)[0]
    assert first == second and not changed
    without = evaluation_config(corpus(tmp_path), "1 process", evaluation={"steps": 2})
    assert ranks.run(1, evaluate_twice, without)[0][0][0] == first


def test_the_micro_batch_size_of_the_evaluation_does_not_change_the_loss(ranks: Pool, tmp_path: Path) -> None:
    data = corpus(tmp_path)
    losses = []
    for size in (None, 1, 4):
        config = evaluation_config(data, "pipeline 2 x data 2", evaluation={"steps": 2, "micro_batch_size": size})
        losses.append(ranks.run(4, evaluate_twice, config)[0][0][0]["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_the_perplexity_is_the_exponential_of_the_loss(ranks: Pool, tmp_path: Path) -> None:
    config = evaluation_config(corpus(tmp_path), "1 process", evaluation={"steps": 1})
    result = ranks.run(1, evaluate_twice, config)[0][0][0]
    assert result.keys() == {"eval_loss", "eval_perplexity"}
    assert result["eval_perplexity"] == math.exp(result["eval_loss"])


def test_a_perplexity_too_large_for_a_number_is_infinite() -> None:
    assert perplexity(2.0) == math.exp(2.0)
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan))
