"""DPO: the loss of its definition in float64 with transformers, and the same training under every layout.

Tolerances as in test_layouts.py.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support.examples import Example, random_example, write_examples
from support.gpt2_pair import gpt2_pair, to_megagpt
from support.pool import Pool, RankError
from support.runs import Tree, full_weights, parameters_by_name, run_trainer, tiny_config

from megagpt.config import Config
from megagpt.data.blend import build_datasets
from megagpt.data.examples import PackedExamples
from megagpt.errors import ConfigError
from megagpt.parallel.topology import Topology
from megagpt.training.micro_batches import HostBatch, global_batches, to_host_batch
from megagpt.training.reference import reference_path

BETA = 0.7
Pair = tuple[Example, Example]


def run_config(folder: Path, prefix: str, start: Path, **sections: Tree) -> Config:
    return tiny_config(
        **{
            "data": {"train": prefix, "task": "preference"},
            "dpo": {"beta": BETA},
            "optimizer": {"type": "sgd", "learning_rate": 0.05, "clip_grad": 0.0, "weight_decay": 0.0},
            "logging": {"interval": 1, "metrics_file": str(folder / "metrics.jsonl")},
            **sections,
            "model": {"activation": "gelu_tanh", "n_positions": 32, **sections.get("model", {})},
            "training": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 1, **sections.get("training", {})},
            "checkpoint": {"initialize_from": str(start), **sections.get("checkpoint", {})},
        }
    )


def random_pairs(n: int) -> list[Pair]:
    """Return pairs with a shared prompt, of different lengths."""
    generator = np.random.default_rng(5)
    pairs = []
    for _ in range(n):
        ids, learned = random_example(generator, int(generator.integers(3, 9)))
        answer = generator.integers(0, 61, int(generator.integers(1, 6))).tolist()
        prompt = learned.index(1)
        pairs.append(((ids, learned), (ids[:prompt] + answer, [0] * prompt + [1] * len(answer))))
    return pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Pair]]:
    pairs = random_pairs(30)
    return write_examples(tmp_path_factory.mktemp("pairs") / "x", pairs), pairs


@pytest.fixture(scope="module")
def start(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a pretraining step, the reference model."""
    folder = tmp_path_factory.mktemp("start")
    prefix = write_examples(folder / "x", [[random_example(np.random.default_rng(n), 33)] for n in range(20)])
    config = tiny_config(
        model={"activation": "gelu_tanh", "n_positions": 32},
        data={"train": prefix},
        training={"steps": 1, "global_batch_size": 4},
        checkpoint={"dir": str(folder / "checkpoints")},
    )
    ranks.run(1, run_trainer, config)
    return folder / "checkpoints"


def batch_of_all(config: Config, references: np.ndarray) -> HostBatch:
    train = build_datasets(config.data, config.model.n_positions).train
    assert isinstance(train, PackedExamples)
    train.references = references
    n = train.samples_per_epoch
    return to_host_batch(global_batches(train, config, Topology(), 1).micro_batches(0, n), config, Topology(), 0, n)


def log_probability(library: transformers.GPT2LMHeadModel, example: Example) -> torch.Tensor:
    ids, learned = example
    log_probs = library(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    taken = log_probs.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
    return (taken * torch.tensor(learned[1:])).sum()


def test_loss_and_gradients_are_those_of_the_definition_in_float64(pairs: tuple[str, list[Pair]], tmp_path: Path) -> None:
    """Several pairs in a sample, each as if alone. fp32 against float64: 2e-5 of the largest value."""
    prefix, examples = pairs
    config = run_config(tmp_path, prefix, tmp_path)
    references = np.random.default_rng(0).normal(0, 2, len(examples)).astype(np.float32)
    batch = batch_of_all(config, references)
    assert batch.n_tokens == len(examples) > len(batch.samples)
    model, library = gpt2_pair(config)
    loss = torch.stack([model(None, part) for part in batch.to(torch.device("cpu"))]).sum() / batch.n_tokens
    loss.backward()
    library = library.double()
    losses, rewards = [], []
    for (chosen, rejected), reference in zip(examples, references.tolist(), strict=True):
        margin = log_probability(library, chosen) - log_probability(library, rejected)
        rewards.append(BETA * (margin.item() - reference))
        losses.append(-torch.log(1 / (1 + torch.exp(-BETA * (margin - reference)))))
    expected = torch.stack(losses).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = parameters_by_name(model)
    gradients = {name: parameter.grad.float() for name, parameter in library.named_parameters()}
    for name, gradient in to_megagpt(gradients, config.model.n_head, config.model.n_layer).items():
        tolerance = 2e-5 * gradient.abs().max().item()
        torch.testing.assert_close(ours[name].grad[: len(gradient)], gradient, rtol=0, atol=tolerance)
    margin, accuracy, n_pairs = (float(number) for number in model.objective.take_rewards(training=True))
    assert n_pairs == len(examples)
    assert margin / n_pairs == pytest.approx(np.mean(rewards), rel=1e-4)
    assert accuracy == sum(reward > 0 for reward in rewards)


LAYOUTS: dict[str, tuple[int, Tree]] = {
    "tensor 2, sequence parallel": (2, {"parallel": {"tensor": 2, "sequence_parallel": True}}),
    "tensor 2 x pipeline 2 x data 2": (8, {"parallel": {"tensor": 2, "pipeline": 2}, "zero": {"stage": 1}}),
    "pipeline 2, zero bubble, LoRA": (2, {"parallel": {"pipeline": 2, "schedule": "zbv"}, "lora": {"rank": 2}}),
}


@pytest.fixture(scope="module")
def reference(
    pairs: tuple[str, list[Pair]], start: Path, ranks: Pool, tmp_path_factory: pytest.TempPathFactory
) -> dict[bool, list[Tree]]:
    """The results of one process, without and with LoRA."""
    folder = tmp_path_factory.mktemp("reference")
    return {
        lora: ranks.run(1, run_trainer, run_config(folder, pairs[0], start, lora={"rank": 2} if lora else {}))
        for lora in (False, True)
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_as_one_process_does(
    name: str, pairs: tuple[str, list[Pair]], start: Path, reference: dict[bool, list[Tree]], ranks: Pool, tmp_path: Path
) -> None:
    """The reference log-probabilities are computed under each layout, too: a copy of the data has none."""
    world, sections = LAYOUTS[name]
    expected = reference["lora" in sections]
    prefix = write_examples(tmp_path / "x", pairs[1])
    results = ranks.run(world, run_trainer, run_config(tmp_path, prefix, start, **sections))
    for key in ("loss", "grad_norm", "reward_margin", "reward_accuracy"):
        values = [record[key] for record in results[0]["records"]]
        # Margins are differences of sums of about 20 nats: 1e-5 of those.
        assert values == pytest.approx([record[key] for record in expected[0]["records"]], rel=1e-5, abs=2e-4)
    weights = full_weights(results)
    for parameter, values in full_weights(expected).items():
        torch.testing.assert_close(weights[parameter], values, rtol=0, atol=5e-6)
    stored = [np.load(reference_path(path))["margins"] for path in (prefix, pairs[0])]
    np.testing.assert_allclose(stored[0], stored[1], rtol=0, atol=2e-4)


def test_the_first_step_has_the_loss_of_a_model_that_equals_its_reference(reference: dict[bool, list[Tree]]) -> None:
    for results in reference.values():
        first = results[0]["records"][0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and first["reward_margin"] == pytest.approx(0, abs=1e-4)


def test_training_prefers_the_chosen_answers(pairs: tuple[str, list[Pair]], start: Path, ranks: Pool, tmp_path: Path) -> None:
    config = run_config(
        tmp_path,
        pairs[0],
        start,
        data={"train": pairs[0], "valid": pairs[0], "task": "preference"},
        training={"steps": 30},
        optimizer={"learning_rate": 3e-3},
    )
    (result,) = ranks.run(1, run_trainer, config)
    final = result["records"][-1]
    assert final["eval_reward_accuracy"] > 0.9 and final["eval_reward_margin"] > 1 and final["eval_loss"] < 0.5
    assert "eval_perplexity" not in final


def test_reference_log_probabilities_are_computed_once_for_each_reference_model(
    start: Path, ranks: Pool, tmp_path: Path
) -> None:
    prefix = write_examples(tmp_path / "x", random_pairs(8))
    one_step: Tree = {"training": {"steps": 1}}
    unchanged: Tree = {"optimizer": {"learning_rate": 1e-20}, "data": {"train": prefix, "valid": prefix, "task": "preference"}}
    (first,) = ranks.run(1, run_trainer, run_config(tmp_path, prefix, start, **one_step, **unchanged))
    # The evaluation counts only its own pairs, not those of the reference model before.
    assert first["records"][-1]["eval_reward_margin"] == pytest.approx(0, abs=1e-4)
    written = reference_path(prefix).stat().st_mtime_ns
    ranks.run(1, run_trainer, run_config(tmp_path, prefix, start, **one_step))
    assert reference_path(prefix).stat().st_mtime_ns == written
    tuned = run_config(tmp_path, prefix, start, checkpoint={"dir": str(tmp_path / "tuned")}, **one_step)
    ranks.run(1, run_trainer, tuned)
    before = np.load(reference_path(prefix))["margins"]
    ranks.run(1, run_trainer, run_config(tmp_path, prefix, tmp_path / "tuned", **one_step))
    after = np.load(reference_path(prefix))["margins"]
    assert np.abs(after - before).max() > 1e-3


def test_a_resumed_run_keeps_the_reference_of_its_start(start: Path, ranks: Pool, tmp_path: Path) -> None:
    """Even if the file with the log-probabilities is lost: they are those of initialize_from, not of the checkpoint."""
    prefix = write_examples(tmp_path / "x", random_pairs(12))
    constant: Tree = {"lr_schedule": {"type": "constant"}}
    entire = ranks.run(1, run_trainer, run_config(tmp_path, prefix, start, **constant))[0]["losses"]
    saved: Tree = {**constant, "checkpoint": {"dir": str(tmp_path / "c")}}
    ranks.run(1, run_trainer, run_config(tmp_path, prefix, start, training={"steps": 2}, **saved))
    reference_path(prefix).unlink()
    losses = ranks.run(2, run_trainer, run_config(tmp_path, prefix, start, parallel={"tensor": 2}, **saved))[0]["losses"]
    assert losses[-2:] == pytest.approx(entire[-2:], rel=1e-4)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"checkpoint": {"initialize_from": None}}, "checkpoint.initialize_from: required by data.task"),
        ({"parallel": {"context": 2}}, "parallel.context: 2 does not work with data.task"),
        ({"zero": {"stage": 3}}, "zero.stage: 3 does not work with data.task"),
        ({"training": {"z_loss": 0.1}}, "training.z_loss: has no meaning for data.task"),
        ({"logging": {"noise_scale_interval": 1}}, "logging.noise_scale_interval: does not work with data.task"),
    ],
)
def test_what_does_not_work_with_preferences_is_refused(sections: Tree, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        run_config(tmp_path, "x", tmp_path, **sections)


def test_chat_data_is_refused_as_preferences(start: Path, ranks: Pool, tmp_path: Path) -> None:
    prefix = write_examples(tmp_path / "x", [[pair[0]] for pair in random_pairs(3)])
    with pytest.raises(RankError, match=r"example 0 has 1 sequences, and this data.task needs 2"):
        ranks.run(1, run_trainer, run_config(tmp_path, prefix, start))
