"""Every family trains under every kind of layout as one process does, and as transformers does.

Tolerances as in `test_layouts.py`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.encoder_decoder import hugging_face_t5
from support.exhaustive import EXHAUSTIVE
from support.families import CASES, LLAMA, by_file_name, random_model
from support.pool import Pool
from support.runs import (
    Tree,
    compare,
    count_labels,
    create_engine,
    full_weights,
    local_weights,
    micro_batches,
    tiny_config,
    train,
    train_step,
)

from megagpt.config import Config
from megagpt.hugging_face.families import FAMILIES
from megagpt.hugging_face.folder import ModelFolder
from megagpt.hugging_face.import_model import Import
from megagpt.hugging_face.model_keys import MODEL_KEYS
from megagpt.hugging_face.peak_memory import PeakMemory
from megagpt.model.forward_context import MicroBatch
from megagpt.progress import NoProgress
from megagpt.training.train_state import restore_weights

STEPS = 2
MODELS: dict[str, Tree] = {
    "grouped heads, sliding windows": {**LLAMA, "n_kv_head": 2, "attention_window": 5, "full_attention_every": 2},
    "one key and value head, norm of heads, z-loss": {**LLAMA, "n_kv_head": 1, "qk_norm": "head", "qkv_bias": True},
    "norms after the branches, norm of the width": {**LLAMA, "n_kv_head": 2, "norm_placement": "after", "qk_norm": "width"},
    "one head, norm of the width": {**LLAMA, "n_kv_head": 1, "qk_norm": "width", "tie_embeddings": True},
    "capped scores and logits, norms on both sides": {
        **LLAMA,
        "norm": "rmsnorm_plus_one",
        "norm_placement": "both",
        "attention_softcap": 5.0,
        "logit_softcap": 3.0,
        "attention_window": 5,
        "embedding_scale": 5.0,
        "tie_embeddings": True,
    },
    "parallel branches": {"parallel_branches": "two_norms", "position_embedding": "rotary", "rotary": {"fraction": 0.5}},
    "learned bias of the scores, sinks, muP": {
        "position_embedding": "relative",
        "relative_buckets": 6,
        "relative_max_distance": 12,
        "attention_sinks": True,
        "mup_base_width": 8,
    },
    "parallel branches with one norm, relative vectors": {
        "parallel_branches": "one_norm",
        "activation": "relu_squared",
        "position_embedding": "relative_vectors",
        "relative_max_distance": 5,
        "n_kv_head": 2,
    },
}
LAYOUTS: dict[str, tuple[int, Tree, int]] = {
    "tensor 4": (4, {"tensor": 4}, 1),
    "data 2, ZeRO-3": (2, {}, 3),
    "2 x 2 x 2, zbv, sequence parallel": (8, {"tensor": 2, "pipeline": 2, "schedule": "zbv", "sequence_parallel": True}, 2),
    "context 2 x tensor 2": (4, {"context": 2, "tensor": 2}, 1),
}


def config_of(model: Tree, z_loss: bool, **sections: Tree) -> Any:
    return tiny_config(model=model, training={"z_loss": 1e-2 if z_loss else 0.0}, **sections)


@pytest.mark.parametrize("name", MODELS)
def test_a_family_trains_under_other_layouts_as_one_process_does(name: str, ranks: Pool) -> None:
    """Each layout runs with two models; with all of them in the exhaustive suite."""
    model, z_loss = MODELS[name], "z-loss" in name
    index = list(MODELS).index(name) % len(LAYOUTS)
    layouts = list(LAYOUTS.values()) if EXHAUSTIVE else [list(LAYOUTS.values())[index]]
    expected = ranks.run(1, train, config_of(model, z_loss), STEPS)
    assert min(expected[0]["norms"]) > 2 * tiny_config().optimizer.clip_grad
    for world, parallel, stage in layouts:
        compare(ranks.run(world, train, config_of(model, z_loss, parallel=parallel, zero={"stage": stage}), STEPS), expected)


IMPORTED: dict[str, tuple[int, Tree]] = {
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2 x pipeline 2": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
}


def imported_config(model: Tree, **sections: Tree) -> Config:
    """Return the config of a run of plain gradient descent: the difference of the weights is the gradient."""
    optimizer = {"type": "sgd", "learning_rate": 1.0, "clip_grad": 0.0, "weight_decay": 0.0}
    return tiny_config(model=model, optimizer=optimizer, **sections)


def first_step(config: Config, checkpoint: Path) -> Tree:
    """Return the loss of the first step after `checkpoint.initialize_from`, and this rank's weights before and after it."""
    engine = create_engine(config)
    restore_weights(engine, checkpoint)
    before = local_weights(engine)
    loss_sum, _ = train_step(engine, 0)
    total = torch.zeros(1) if loss_sum is None else loss_sum.reshape(1).clone()
    dist.all_reduce(total)
    after = local_weights(engine)
    engine.close()
    return {"loss": total.item() / config.parallel.tensor / count_labels(config, 0), "before": before, "weights": after}


def logits_of(theirs: Any, batch: MicroBatch) -> torch.Tensor:
    """Return the logits of a model of transformers."""
    if batch.source is None or batch.source_lengths is None:
        return theirs(batch.tokens).logits
    mask = (torch.arange(batch.source.shape[1]) < batch.source_lengths.unsqueeze(1)).long()
    return theirs(input_ids=batch.source, attention_mask=mask, decoder_input_ids=batch.tokens).logits


def check_first_step(theirs: Any, family: str, model: Tree, tolerance: float, ranks: Pool, folder: Path) -> None:
    """Compare loss and gradients of the imported model under `IMPORTED` with those of transformers.

    `tolerance`: of a gradient, relative to its largest value.
    """
    theirs.save_pretrained(folder / "model")
    checkpoint = Import(ModelFolder(folder / "model")).write(folder / "checkpoint", PeakMemory(), NoProgress()).folder
    config = imported_config(model)
    loss = torch.zeros(())
    for batch in micro_batches(config, 0, 0, 1):
        logits = logits_of(theirs, batch).flatten(0, 1)
        loss = loss + torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=-100, reduction="sum")
    loss = loss / count_labels(config, 0)
    loss.backward()
    gradients = by_file_name({name: parameter.grad for name, parameter in theirs.named_parameters()})
    rules = list(FAMILIES[family].rules(config.model))
    expected = {name: rule.to_megagpt([gradients[prefix + part] for part in rule.names]) for name, rule, prefix in rules}
    for world, parallel in IMPORTED.values() if EXHAUSTIVE else [IMPORTED["tensor 2 x pipeline 2"]]:
        results = ranks.run(world, first_step, imported_config(model, parallel=parallel), checkpoint)
        assert results[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        before = full_weights([{"weights": result["before"]} for result in results])
        after = full_weights(results)
        assert before.keys() == expected.keys()
        for name, gradient in expected.items():
            atol = tolerance * gradient.abs().max().item() + 1e-6  # the weights are rounded to fp32
            torch.testing.assert_close(
                before[name] - after[name], gradient, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("case", [name for name, family in FAMILIES.items() if family.encoder is None])
def test_an_imported_model_has_the_loss_and_the_gradients_of_transformers_under_every_layout(
    case: str, ranks: Pool, tmp_path: Path
) -> None:
    """fp32; the same sums in another order: 2e-5 relative to the largest value."""
    pytest.importorskip("transformers")
    check_first_step(random_model(case), case, CASES[case][0], 2e-5, ranks, tmp_path)


@pytest.mark.parametrize("version", ["v1.0", "v1.1"])
def test_an_imported_t5_has_the_loss_and_the_gradients_of_transformers_under_every_layout(
    version: str, ranks: Pool, tmp_path: Path
) -> None:
    """5e-4 of the largest value: T5's scores are not scaled, so softmax amplifies rounding."""
    pytest.importorskip("transformers")
    theirs = hugging_face_t5(version)
    keys = {**theirs.config.to_dict(), "model_type": "t5"}
    model = {**MODEL_KEYS["t5"].to_model(keys), "n_positions": 16, "encoder_positions": 24}
    check_first_step(theirs, "t5", model, 5e-4, ranks, tmp_path)
