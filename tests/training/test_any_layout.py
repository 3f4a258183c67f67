"""Models, layouts, schedules, ZeRO stages, shapes and batch splits drawn at random train as one process does.

6 draws by default (24 in the exhaustive suite), the same each time. For other draws:
MEGAGPT_LAYOUT_DRAWS=300 python -m pytest tests/training/test_any_layout.py
"""

import os

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from support.exhaustive import EXHAUSTIVE
from support.pool import Pool
from support.runs import Tree, compare, tiny_config, train

from megagpt.schedules.registry import SCHEDULES

DRAWS = int(os.environ.get("MEGAGPT_LAYOUT_DRAWS", "24" if EXHAUSTIVE else "6"))
STEPS = 2
DROPOUTS: list[Tree] = [{}, {"embd_pdrop": 0.2, "attn_pdrop": 0.2, "resid_pdrop": 0.2, "mlp_pdrop": 0.2}]


@st.composite
def families(draw: st.DrawFn) -> Tree:
    """Draw the keys that compose the block; those of different families are mixed."""

    def one_of(*values: object) -> object:
        return draw(st.sampled_from(values))

    keys: Tree = {
        "n_kv_head": one_of(None, None, 1, 2),
        "head_dim": one_of(None, None, 12),
        "ffn_hidden": one_of(None, 40),
        "activation": one_of("gelu", "gelu_tanh", "relu", "relu_squared", "silu"),
        "gated_mlp": draw(st.booleans()),
        "norm": one_of("layernorm", "rmsnorm", "rmsnorm_plus_one"),
        "norm_placement": one_of("before", "before", "after", "both"),
        "qk_norm": one_of("none", "none", "head"),
        "position_embedding": one_of("learned", "rotary", "rotary", "alibi", "relative", "relative_vectors", "none"),
        "relative_max_distance": one_of(17, 128),
        "attention_sinks": one_of(False, False, True),
        "init_scheme": one_of("plain", "scaled", "small_wang"),
        "attention_window": one_of(None, None, 1, 3, 7),
        "attention_scale": one_of(None, 0.2),
        "attention_softcap": one_of(None, None, 4.0),
        "qkv_bias": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "embedding_scale": one_of(1.0, 3.0),
        "logit_softcap": one_of(None, None, 3.0),
    }
    if keys["init_scheme"] != "small_wang":
        keys["mup_base_width"] = one_of(None, 8)
    if keys["norm"] == "rmsnorm":
        keys["qk_norm"] = one_of("none", "head", "width")
    if keys["norm_placement"] == "before":
        keys["parallel_branches"] = one_of("no", "two_norms", "one_norm")
    else:  # a norm of a branch's output multiplies the rounding errors of one that is almost zero
        keys["layer_norm_epsilon"] = 1e-2
    if keys["attention_window"] is not None:
        keys["full_attention_every"] = one_of(None, 2, 3)
    if keys["position_embedding"] == "rotary":
        scalings: list[Tree] = [
            {},
            {"scaling": "linear", "factor": 2.0},
            {"scaling": "ntk", "factor": 2.0},
            {"scaling": "yarn", "factor": 2.0, "original_positions": 8},
            {"scaling": "llama3", "factor": 2.0, "original_positions": 8},
        ]
        scaling = draw(st.sampled_from(scalings))
        keys["rotary"] = {"fraction": one_of(0.5, 1.0), "interleaved": draw(st.booleans()), **scaling}
    return keys


@st.composite
def encoder_families(draw: st.DrawFn) -> Tree:
    """Draw the keys of a model with an encoder."""
    keys: Tree = draw(families())
    for key in ("norm_placement", "parallel_branches", "qk_norm", "attention_window", "full_attention_every"):
        keys.pop(key, None)
    keys |= {"attention_softcap": None, "attention_sinks": False, "layer_norm_epsilon": 1e-5}
    if keys["position_embedding"] in ("alibi", "relative_vectors"):
        keys["position_embedding"] = "relative"
    keys["encoder_layers"] = draw(st.integers(1, 6))
    keys["encoder_positions"] = draw(st.sampled_from([None, 8, 24]))
    keys["output_scale"] = draw(st.sampled_from([1.0, 0.3]))
    return keys


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, Tree, Tree]:
    """Draw a world size, the sections that describe the run, and those that describe the layout."""
    tensor = draw(st.sampled_from([1, 1, 2, 4]))
    pipeline = draw(st.sampled_from([size for size in (1, 2, 4) if size * tensor <= 8]))
    context = draw(st.sampled_from([size for size in (1, 2, 4) if size * tensor * pipeline <= 8 and size * tensor <= 4]))
    data = draw(st.sampled_from([size for size in (1, 2, 4) if size * tensor * pipeline * context <= 8]))
    micro = draw(st.sampled_from([1, 2]))
    per_rank = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    run: Tree = {
        "model": {
            "n_layer": draw(st.integers(max(2, 2 * pipeline), 8)),
            "n_embd": draw(st.sampled_from([16, 32])),
            "n_positions": draw(st.sampled_from([8, 16])),
            "vocab_size": draw(st.integers(17, 70)),  # the last tensor ranks may have padding only
            "tie_embeddings": draw(st.booleans()),
            **draw(st.sampled_from(DROPOUTS)),
            **draw(st.one_of(st.just({}), families(), families(), encoder_families())),
        },
        "training": {
            "steps": STEPS,
            "micro_batch_size": micro,
            "global_batch_size": micro * data * per_rank,
            "seed": draw(st.integers(0, 99)),
            "z_loss": draw(st.sampled_from([0.0, 0.0, 1e-2])),
            "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1])),
        },
    }
    kinds = ["adamw"] if run["model"].get("mup_base_width") else ["adamw", "sgd", "muon"]
    scales = draw(st.sampled_from([{}, {}, {"embedding.*": 0.5, "layers.*.bias": 2.0}]))
    biased = all(run["model"].get(key, True) for key in ("qkv_bias", "attention_bias", "mlp_bias"))
    run["optimizer"] = {"type": draw(st.sampled_from(kinds)), "learning_rate_scales": scales if biased else {}}
    run["lora"] = draw(st.sampled_from([{}, {}, {"rank": 2, "alpha": 4.0}]))
    parallel: Tree = {"tensor": tensor, "pipeline": pipeline, "context": context}
    parallel |= {"sequence_parallel": tensor > 1 and draw(st.booleans())}
    if pipeline > 1:
        parallel["schedule"] = draw(st.sampled_from(list(SCHEDULES)))
        if SCHEDULES[parallel["schedule"]].interleaved:
            parallel["virtual_stages"] = draw(st.integers(2, run["model"]["n_layer"] // pipeline))
    layout: Tree = {
        "parallel": parallel,
        "zero": {
            "stage": draw(st.integers(0, 3 if pipeline == 1 and run["optimizer"]["type"] != "muon" else 2)),
            "reduce_bucket_mib": draw(st.sampled_from([64.0, 1e-3])),
        },
        "training": {
            "recompute": draw(st.sampled_from(["none", "selective", "full"])),
            "micro_batch_size": micro * draw(st.sampled_from([split for split in (1, 2) if per_rank % split == 0])),
        },
    }
    return tensor * pipeline * context * data, run, layout


@settings(
    max_examples=DRAWS,
    deadline=None,
    derandomize="MEGAGPT_LAYOUT_DRAWS" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(cases())
def test_any_layout_trains_as_one_process_does(ranks: Pool, case: tuple[int, Tree, Tree]) -> None:
    world, run, layout = case
    note(f"{world} ranks: {run} {layout}")
    training = {**run["training"], **layout["training"]}
    config = tiny_config(**{**run, "training": training, "parallel": layout["parallel"], "zero": layout["zero"]})
    expected = ranks.run(1, train, tiny_config(**run), STEPS)
    compare(ranks.run(world, train, config, STEPS), expected)
