"""Supervised fine-tuning: the gradient is that of transformers on each example alone, and every layout trains the same.

Tolerances as in test_layouts.py.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.examples import Example, random_example, write_examples
from support.gpt2_pair import gpt2_pair, to_megagpt
from support.pool import Pool
from support.runs import Tree, full_weights, parameters_by_name, run_trainer, tiny_config

from megagpt.config import Config
from megagpt.data.blend import build_datasets
from megagpt.parallel.topology import Topology
from megagpt.training.micro_batches import global_batches, to_host_batch

SIZES = (5, 17, 9, 3, 12, 8, 2, 15, 6, 4, 7, 11, 13, 10, 16, 14) * 4


def run_config(folder: Path, prefix: str, **sections: Tree) -> Config:
    return tiny_config(
        data={"train": prefix, "task": "chat"},
        logging={"interval": 1, "metrics_file": str(folder / "metrics.jsonl")},
        **{**sections, "training": {"steps": 4, "global_batch_size": 8, **sections.get("training", {})}},
    )


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Example]]:
    generator = np.random.default_rng(3)
    examples = [random_example(generator, size) for size in SIZES]
    return write_examples(tmp_path_factory.mktemp("examples") / "x", [[example] for example in examples]), examples


def test_loss_and_gradients_equal_those_of_transformers_on_each_example_alone(
    examples: tuple[str, list[Example]], tmp_path: Path
) -> None:
    """One epoch as one batch, so the mean is over all learned tokens. fp32 sums in another order: 1e-5 of the largest."""
    prefix, alone = examples
    config = run_config(tmp_path, prefix, model={"activation": "gelu_tanh", "init_std": 0.3})
    train = build_datasets(config.data, config.model.n_positions).train
    n = train.samples_per_epoch
    batch = to_host_batch(global_batches(train, config, Topology(), 1).micro_batches(0, n), config, Topology(), 0, n)
    assert batch.n_tokens == sum(sum(learned) for _, learned in alone)
    model, library = gpt2_pair(config)
    loss = torch.stack([model(None, part) for part in batch.to(torch.device("cpu"))]).sum() / batch.n_tokens
    loss.backward()
    total = torch.zeros(())
    for ids, learned in alone:
        if len(ids) > config.model.n_positions:  # transformers has no position for a last token that is only a label
            logits = library(torch.tensor([ids[:-1]])).logits[0]
            labels = torch.tensor([token if mine else -100 for token, mine in zip(ids, learned, strict=True)][1:])
            total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            continue
        labels = torch.tensor([[token if mine else -100 for token, mine in zip(ids, learned, strict=True)]])
        total = total + library(input_ids=torch.tensor([ids]), labels=labels).loss * sum(learned)
    (total / batch.n_tokens).backward()
    assert loss.item() == pytest.approx(total.item() / batch.n_tokens, rel=1e-5)
    ours = parameters_by_name(model)
    gradients = {name: parameter.grad for name, parameter in library.named_parameters()}
    for name, gradient in to_megagpt(gradients, config.model.n_head, config.model.n_layer).items():
        tolerance = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(ours[name].grad[: len(gradient)], gradient, rtol=0, atol=tolerance)


LAYOUTS: dict[str, tuple[int, Tree]] = {
    "tensor 2, sequence parallel": (2, {"parallel": {"tensor": 2, "sequence_parallel": True}}),
    "context 2": (2, {"parallel": {"context": 2}}),
    "2 x 2 x 2": (8, {"parallel": {"tensor": 2, "pipeline": 2}}),
}


@pytest.fixture(scope="module")
def reference(examples: tuple[str, list[Example]], ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> list[Tree]:
    return ranks.run(1, run_trainer, run_config(tmp_path_factory.mktemp("reference"), examples[0]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_as_one_process_does(
    name: str, examples: tuple[str, list[Example]], reference: list[Tree], ranks: Pool, tmp_path: Path
) -> None:
    world, sections = LAYOUTS[name]
    results = ranks.run(world, run_trainer, run_config(tmp_path, examples[0], **sections))
    for key in ("loss", "grad_norm"):
        values = [record[key] for record in results[0]["records"]]
        assert values == pytest.approx([record[key] for record in reference[0]["records"]], rel=1e-5)
    weights = full_weights(results)
    for parameter, values in full_weights(reference).items():
        torch.testing.assert_close(weights[parameter], values, rtol=0, atol=5e-6)


def test_a_run_that_stops_in_the_middle_continues_with_the_next_sample(
    examples: tuple[str, list[Example]], reference: list[Tree], ranks: Pool, tmp_path: Path
) -> None:
    """The second half runs on another layout, and trains to the losses of the run in one piece."""
    constant: Tree = {"lr_schedule": {"type": "constant"}, "checkpoint": {"dir": str(tmp_path / "c"), "resume": "auto"}}
    entire = ranks.run(1, run_trainer, run_config(tmp_path, examples[0], lr_schedule={"type": "constant"}))[0]["losses"]
    first = ranks.run(2, run_trainer, run_config(tmp_path, examples[0], training={"steps": 2}, **constant))[0]["losses"]
    second = ranks.run(2, run_trainer, run_config(tmp_path, examples[0], parallel={"tensor": 2}, **constant))[0]["losses"]
    assert first[:2] == pytest.approx(entire[:2], rel=1e-5)
    assert second[-2:] == pytest.approx(entire[-2:], rel=1e-5)
