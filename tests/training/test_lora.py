"""LoRA: the gradient of the low-rank product, the same training under every layout, and merged export.

Tolerances as in test_layouts.py. SGD, because Adam would hide a gradient that is summed twice.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.families import LLAMA
from support.pool import Pool, RankError
from support.runs import (
    Tree,
    compare,
    corpus,
    full_model,
    full_weights,
    micro_batches,
    parameters_by_name,
    run_trainer,
    tiny_config,
    train,
)

from megagpt.checkpoint.merged import open_merged
from megagpt.commands import convert_checkpoint, export_weights
from megagpt.config import Config
from megagpt.engine.freezing import freeze
from megagpt.errors import ConfigError
from megagpt.hugging_face.compare_logits import their_logits
from megagpt.inference.load import load_model
from megagpt.model.chunk import build_chunk
from megagpt.parallel.adapter import is_adapter, merged
from megagpt.parallel.parallel_context import ParallelContext
from megagpt.parallel.parameter import shard_of

LORA: Tree = {"rank": 3, "alpha": 12.0}
SGD: Tree = {"type": "sgd", "learning_rate": 0.1, "clip_grad": 0.0, "weight_decay": 0.0}
MULTI_QUERY: Tree = {**LLAMA, "n_kv_head": 1}
"""With one key and value head, which every tensor rank computes."""
MODELS: dict[str, Tree] = {"gpt2": {"activation": "gelu_tanh"}, "llama": MULTI_QUERY}


def lora_config(model: str = "gpt2", **sections: Tree) -> Config:
    return tiny_config(**{"lora": LORA, "optimizer": SGD, "model": MODELS[model], **sections})


@pytest.mark.parametrize("model", MODELS)
def test_the_gradients_are_those_of_the_low_rank_product(model: str) -> None:
    """With W' = W + s B A and a loss of W': dL/dA = s B^T dL/dW' and dL/dB = s dL/dW' A^T.

    fp32, and W' is rounded in each of four layers: 5e-5 of the largest.
    """
    config = lora_config(model)
    adapted = full_model(config)
    freeze([adapted], config)
    plain = full_model(config.model_copy(update={"lora": tiny_config().lora}))
    ours, theirs = parameters_by_name(adapted), parameters_by_name(plain)
    scale, layers = 12.0 / 3, [name.removesuffix(".lora_a") for name in ours if name.endswith(".lora_a")]
    assert len(layers) == 4 * (4 if model == "gpt2" else 5)
    with torch.no_grad():
        for layer in layers:
            assert not ours[f"{layer}.lora_b"].any() and ours[f"{layer}.lora_a"].std() > 0
            ours[f"{layer}.lora_b"].normal_(0, 0.1)
            weight = theirs[f"{layer}.weight"]
            weight.copy_(merged(weight, ours[f"{layer}.lora_a"], ours[f"{layer}.lora_b"], scale))
    batch = micro_batches(config, 0, 0, 1)[0]
    losses = [chunk(None, batch) for chunk in (adapted, plain)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    for layer in layers:
        gradient, a, b = theirs[f"{layer}.weight"].grad, ours[f"{layer}.lora_a"], ours[f"{layer}.lora_b"]
        assert gradient is not None
        expected_a = scale * (b.flatten(0, -2).t() @ gradient.flatten(0, -2))
        for actual, expected in ((a.grad, expected_a), (b.grad, scale * gradient @ a.t())):
            torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5 * expected.abs().max().item())
    assert all(parameter.grad is None for name, parameter in ours.items() if not is_adapter(name))


LAYOUTS: dict[str, tuple[int, str, Tree]] = {
    "tensor 2, sequence parallel": (2, "gpt2", {"parallel": {"tensor": 2, "sequence_parallel": True}}),
    "tensor 2 x pipeline 2 x data 2": (8, "llama", {"parallel": {"tensor": 2, "pipeline": 2}, "zero": {"stage": 1}}),
    "ZeRO-3": (2, "gpt2", {"zero": {"stage": 3}}),
}
STEPS = 3


@pytest.fixture(scope="module")
def single_process(ranks: Pool) -> dict[str, list[Tree]]:
    return {model: ranks.run(1, train, lora_config(model), STEPS) for model in MODELS}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_as_one_process_does(name: str, ranks: Pool, single_process: dict[str, list[Tree]]) -> None:
    world, model, sections = LAYOUTS[name]
    compare(ranks.run(world, train, lora_config(model, **sections), STEPS), single_process[model])


@pytest.mark.parametrize("model", MODELS)
def test_only_the_adapters_are_trained(model: str, single_process: dict[str, list[Tree]]) -> None:
    results = single_process[model]
    weights = full_weights(results)
    initial = parameters_by_name(full_model(lora_config(model)))
    for name, values in weights.items():
        changed = not torch.equal(values, initial[name].detach()[: len(values)])
        assert changed == is_adapter(name), name


@pytest.mark.parametrize("targets", [["layers.0.attention.qkv"], ["layers.*.mlp.*", "layers.3.attention.proj"]])
def test_the_patterns_choose_the_layers(targets: list[str]) -> None:
    names = {
        name for name in parameters_by_name(full_model(lora_config(lora={**LORA, "targets": targets}))) if is_adapter(name)
    }
    layers = {"layers.0.attention.qkv"}
    if len(targets) > 1:
        layers = {*(f"layers.{n}.mlp.{part}" for n in range(4) for part in ("up", "down")), "layers.3.attention.proj"}
    assert names == {f"{layer}.{part}" for layer in layers for part in ("lora_a", "lora_b")}


def test_a_pattern_that_matches_no_layer_is_refused_with_the_nearest() -> None:
    config = lora_config(lora={**LORA, "targets": ["layers.*.attn.*"]})
    with pytest.raises(
        ConfigError, match=r"lora.targets: 'layers.\*.attn.\*' matches no linear layer of this model; the nearest"
    ):
        freeze([full_model(config)], config)


@pytest.fixture(scope="module")
def trained(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[Tree]]:
    """A LoRA run of two steps on tensor 2 x pipeline 2, saved, and its ranks' results."""
    folder = tmp_path_factory.mktemp("lora")
    config = lora_config(
        "llama",
        parallel={"tensor": 2, "pipeline": 2},
        zero={"stage": 1},
        data={"train": corpus(folder)},
        training={"steps": 2, "global_batch_size": 8},
        checkpoint={"dir": str(folder / "checkpoints")},
    )
    return config, ranks.run(4, run_trainer, config)


def unmerged_logits(config: Config, results: list[Tree], tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of the trained model with its adapters, from the weights of the ranks."""
    model = build_chunk(config, ParallelContext(), range(config.model.n_layer))
    with torch.no_grad():
        for parameter in model.parameters():
            values = full_weights(results)[shard_of(parameter).name]
            parameter[: len(values)] = values
        return model.eval().logits(tokens)


def test_the_exported_model_has_the_logits_of_the_adapted_one_in_transformers(
    trained: tuple[Config, list[Tree]], tmp_path: Path
) -> None:
    """fp32; W + s B A rounds once more than the two products: 1e-5 of the largest logit."""
    config, results = trained
    tokens = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = unmerged_logits(config, results, tokens)
    arguments = ["to-hf", str(config.checkpoint.dir), "--output", str(tmp_path / "hf"), "--check"]
    assert convert_checkpoint.main(arguments) == 0
    close = {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}
    torch.testing.assert_close(their_logits(tmp_path / "hf", tokens), expected, **close)
    without = unmerged_logits(config.model_copy(update={"lora": tiny_config().lora}), results, tokens)
    assert (without - expected).abs().max() > 1e-2  # the adapters matter
    model, loaded = load_model(Path(str(config.checkpoint.dir)) / "step_00000002")
    assert loaded.lora.rank is None
    torch.testing.assert_close(model.logits(tokens), expected, **close)


def test_exported_weights_contain_the_adapters(trained: tuple[Config, list[Tree]], tmp_path: Path) -> None:
    config, results = trained
    arguments = ["--checkpoint", str(config.checkpoint.dir), "--output", str(tmp_path / "w.safetensors")]
    assert export_weights.main(arguments) == 0
    exported, weights = load_file(tmp_path / "w.safetensors"), full_weights(results)
    assert exported.keys() == {name for name in weights if not is_adapter(name)}
    for name, values in exported.items():
        layer = name.removesuffix(".weight")
        expected = weights[name]
        if f"{layer}.lora_a" in weights:
            expected = merged(expected, weights[f"{layer}.lora_a"], weights[f"{layer}.lora_b"], 4.0)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)


def test_a_checkpoint_has_optimizer_states_of_the_adapters_only(ranks: Pool, tmp_path: Path) -> None:
    config = lora_config(
        optimizer={"type": "adamw"},
        data={"train": corpus(tmp_path)},
        training={"steps": 1},
        checkpoint={"dir": str(tmp_path / "checkpoints")},
    )
    ranks.run(1, run_trainer, config)
    manifest = open_merged(tmp_path / "checkpoints" / "step_00000001")._adapters.manifest  # type: ignore[attr-defined]
    for name, record in manifest.tensors.items():
        assert (len(record.kinds) > 1) == is_adapter(name), name


def test_a_run_resumes_on_another_layout_and_refuses_other_adapters(
    trained: tuple[Config, list[Tree]], ranks: Pool, tmp_path: Path
) -> None:
    config, _ = trained
    source = f"{config.checkpoint.dir}/step_00000002"

    def continued(world: int, **sections: Tree) -> dict[str, torch.Tensor]:
        training = {"steps": 4, "global_batch_size": 8}
        data = {"train": config.data.train}
        keys: Tree = {"training": training, "data": data, "checkpoint": {"resume": source}, **sections}
        return full_weights(ranks.run(world, run_trainer, lora_config("llama", **keys)))

    expected = continued(1)
    actual = continued(4, parallel={"tensor": 2, "sequence_parallel": True})
    for name, values in expected.items():
        torch.testing.assert_close(actual[name], values, rtol=0, atol=5e-6)
    for other in ({**LORA, "alpha": 1.0}, {}):
        with pytest.raises(RankError, match=r"was saved with lora .* start from its merged weights with checkpoint.init"):
            continued(1, lora=other)


def test_a_new_run_starts_from_the_merged_weights_with_new_adapters(trained: tuple[Config, list[Tree]], ranks: Pool) -> None:
    """A learning rate of almost 0 keeps the weights as they were loaded."""
    config, results = trained
    before = full_weights(results)
    start: Tree = {
        "optimizer": {**SGD, "learning_rate": 1e-30},
        "data": {"train": config.data.train},
        "training": {"steps": 1},
        "checkpoint": {"initialize_from": str(config.checkpoint.dir)},
    }
    for lora in ({}, {"rank": 2}):
        loaded = full_weights(ranks.run(1, run_trainer, lora_config("llama", lora=lora, **start)))
        layer = "layers.1.mlp.gate_up"
        expected = merged(before[f"{layer}.weight"], before[f"{layer}.lora_a"], before[f"{layer}.lora_b"], 4.0)
        torch.testing.assert_close(loaded[f"{layer}.weight"], expected, rtol=0, atol=1e-6)
        assert (f"{layer}.lora_a" in loaded) == (lora != {})
        if lora:
            assert loaded[f"{layer}.lora_b"].abs().max() < 1e-20 < loaded[f"{layer}.lora_a"].abs().max()
