"""A classification head on the last token: the loss and gradients of a plain implementation, and the same under layouts.

Tolerances as in test_layouts.py.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.examples import Example, write_examples
from support.gpt2_pair import gpt2_pair, to_megagpt
from support.pool import Pool
from support.runs import Tree, full_model, full_weights, parameters_by_name, run_trainer, tiny_config

from megagpt.config import Config
from megagpt.data.blend import build_datasets
from megagpt.errors import ConfigError
from megagpt.labels import IGNORED
from megagpt.parallel.topology import Topology
from megagpt.training.micro_batches import global_batches, to_host_batch

CLASSES = ["a", "b", "c"]
SIZES = (3, 16, 7, 1, 9, 5, 12, 2, 6, 11, 4, 8) * 2


def run_config(folder: Path, prefix: str, **sections: Tree) -> Config:
    return tiny_config(
        **{
            "optimizer": {"type": "sgd", "learning_rate": 0.1, "clip_grad": 0.0, "weight_decay": 0.0},
            "logging": {"interval": 1, "metrics_file": str(folder / "metrics.jsonl")},
            **sections,
            "model": {"activation": "gelu_tanh", **sections.get("model", {})},
            "data": {"train": prefix, "task": "classification", "classes": CLASSES, **sections.get("data", {})},
            "training": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 1, **sections.get("training", {})},
        }
    )


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Example]]:
    """Random texts with a class; the mask has the class, from 1, at the last token."""
    generator = np.random.default_rng(1)
    texts = [generator.integers(0, 61, size).tolist() for size in SIZES]
    examples = [(ids, [0] * (len(ids) - 1) + [int(generator.integers(1, 4))]) for ids in texts]
    return write_examples(tmp_path_factory.mktemp("texts") / "x", [[example] for example in examples]), examples


def test_loss_and_gradients_equal_those_of_a_linear_layer_on_the_last_hidden_state_of_transformers(
    examples: tuple[str, list[Example]], tmp_path: Path
) -> None:
    """Several texts in a sample, each as if alone. fp32 sums in another order: 1e-5 of the largest."""
    prefix, texts = examples
    config = run_config(tmp_path, prefix)
    train = build_datasets(config.data, config.model.n_positions).train
    n = train.samples_per_epoch
    batch = to_host_batch(global_batches(train, config, Topology(), 1).micro_batches(0, n), config, Topology(), 0, n)
    assert batch.n_tokens == len(texts) > n
    _, library = gpt2_pair(tiny_config(model={"activation": "gelu_tanh", "init_std": 0.3}))
    model = full_model(config)
    ours = parameters_by_name(model)
    head = torch.nn.Linear(config.model.n_embd, len(CLASSES), bias=False)
    with torch.no_grad():
        for name, values in to_megagpt(library.state_dict(), config.model.n_head, config.model.n_layer).items():
            ours[name][: len(values)] = values
        ours["classifier.weight"][: len(CLASSES)] = head.weight
    loss = torch.stack([model(None, part) for part in batch.to(torch.device("cpu"))]).sum() / batch.n_tokens
    loss.backward()
    logits = torch.cat([head(library.transformer(torch.tensor([ids])).last_hidden_state[:, -1]) for ids, _ in texts])
    labels = torch.tensor([mask[-1] - 1 for _, mask in texts])
    expected = torch.nn.functional.cross_entropy(logits, labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in library.named_parameters()}
    pairs = to_megagpt(gradients, config.model.n_head, config.model.n_layer) | {"classifier.weight": head.weight.grad}
    for name, gradient in pairs.items():
        tolerance = 1e-5 * max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(ours[name].grad[: len(gradient)], gradient, rtol=0, atol=tolerance)
    model.eval()
    with torch.no_grad():
        for part in batch.to(torch.device("cpu")):
            model(None, part)
    confusion = torch.zeros(3, 3, dtype=torch.long)
    for label, predicted in zip(labels.tolist(), logits.argmax(-1).tolist(), strict=True):
        confusion[label, predicted] += 1
    assert torch.equal(model.objective.take_confusion(), confusion)


def test_a_text_as_long_as_the_sequence_is_used(tmp_path: Path) -> None:
    """Its last token must be an input, not only a label, as in language modelling."""
    prefix = write_examples(tmp_path / "x", [[(list(range(16)), [0] * 15 + [2])], [([5, 6], [0, 3])]])
    config = run_config(tmp_path, prefix)
    train = build_datasets(config.data, 16).train
    labels = [train.sample(index).labels for index in range(train.samples_per_epoch)]
    found = sorted((int(np.flatnonzero(row != IGNORED)[0]), int(row[row != IGNORED][0])) for row in labels if row is not None)
    assert found == [(1, 2), (15, 1)]


DROPOUT: Tree = {"model": {"clf_pdrop": 0.3}}
LAYOUTS: dict[str, tuple[int, Tree]] = {
    "tensor 2, sequence parallel": (2, {"parallel": {"tensor": 2, "sequence_parallel": True}}),
    "tensor 2 x data 2, ZeRO-1": (4, {"parallel": {"tensor": 2}, "zero": {"stage": 1}}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_and_evaluates_as_one_process_does(
    name: str, examples: tuple[str, list[Example]], ranks: Pool, tmp_path: Path
) -> None:
    prefix, texts = examples
    world, sections = LAYOUTS[name]
    valid: Tree = {"data": {"valid": prefix}, "evaluation": {"samples": None}}
    expected = ranks.run(1, run_trainer, run_config(tmp_path, prefix, **DROPOUT, **valid))
    results = ranks.run(world, run_trainer, run_config(tmp_path, prefix, **DROPOUT, **valid, **sections))
    for record, other in zip(results[0]["records"], expected[0]["records"], strict=True):
        for key in ("loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_confusion"):
            if key in other and key != "eval_confusion":
                assert record[key] == pytest.approx(other[key], rel=1e-5)
            elif key in other:
                assert record[key] == other[key] and sum(map(sum, other[key])) == len(texts)
    weights = full_weights(results)
    for parameter, values in full_weights(expected).items():
        torch.testing.assert_close(weights[parameter], values, rtol=0, atol=5e-6)
    without = ranks.run(1, run_trainer, run_config(tmp_path, prefix, **valid))[0]["losses"]
    assert without[0] != expected[0]["losses"][0]  # the dropout of the head matters


def test_with_lora_the_head_is_trained_beside_the_adapters(
    examples: tuple[str, list[Example]], ranks: Pool, tmp_path: Path
) -> None:
    config = run_config(tmp_path, examples[0], lora={"rank": 2})
    initial = parameters_by_name(full_model(config))
    for name, values in full_weights(ranks.run(1, run_trainer, config)).items():
        changed = not torch.equal(values, initial[name].detach()[: len(values)])
        assert changed == (".lora_" in name or name == "classifier.weight"), name


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"parallel": {"pipeline": 2}}, "parallel.pipeline: does not work with data.task"),
        ({"zero": {"stage": 3}}, "zero.stage: 3 does not work with data.task"),
        ({"data": {"classes": []}}, "data.classes: goes with data.task"),
        ({"data": {"task": "chat"}}, "data.classes: goes with data.task"),
    ],
)
def test_what_does_not_work_with_classes_is_refused(sections: Tree, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        run_config(tmp_path, "x", **sections)
