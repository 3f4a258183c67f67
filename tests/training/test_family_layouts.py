"""Every family trains under every kind of layout as one process does; tolerances as in `test_layouts.py`."""

from typing import Any

import pytest
from support.pool import Pool
from support.runs import Tree, compare, tiny_config, train

STEPS = 3
LLAMA: Tree = {
    "position_embedding": "rotary",
    "norm": "rmsnorm",
    "gated_mlp": True,
    "activation": "silu",
    "ffn_hidden": 48,
    "qkv_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_embeddings": False,
}
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
    "parallel branches with one norm": {"parallel_branches": "one_norm", "activation": "relu_squared"},
}
LAYOUTS: dict[str, tuple[int, Tree, int]] = {
    "tensor 4": (4, {"tensor": 4}, 1),
    "2 x 2 x 2, zbv, sequence parallel": (8, {"tensor": 2, "pipeline": 2, "schedule": "zbv", "sequence_parallel": True}, 2),
    "context 2 x tensor 2": (4, {"context": 2, "tensor": 2}, 1),
    "data 2, ZeRO-3": (2, {}, 3),
}


def config_of(model: Tree, z_loss: bool, **sections: Tree) -> Any:
    return tiny_config(model=model, training={"z_loss": 1e-2 if z_loss else 0.0}, **sections)


@pytest.mark.parametrize("name", MODELS)
def test_a_family_trains_under_every_kind_of_layout_as_one_process_does(name: str, ranks: Pool) -> None:
    model, z_loss = MODELS[name], "z-loss" in name
    expected = ranks.run(1, train, config_of(model, z_loss), STEPS)
    assert min(expected[0]["norms"]) > 2 * tiny_config().optimizer.clip_grad
    for world, parallel, stage in LAYOUTS.values():
        compare(ranks.run(world, train, config_of(model, z_loss, parallel=parallel, zero={"stage": stage}), STEPS), expected)
